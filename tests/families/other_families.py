"""Families that take images, sounds or series, alone or together with text."""

from __future__ import annotations

import torch
from family import (
    BOTH,
    ENCODER_DECODER,
    EXPERTS,
    IMAGE,
    IMAGE_AND_TEXT,
    LLAMA_LINEARS,
    PIECE,
    TEXT,
    TOKENS,
    VISION,
    Config,
    Family,
    floats,
    with_pieces,
)

# the formatter would spread each row over many lines
# fmt: off
# --- images -----------------------------------------------------------------------------------------------------------

LABELS: Config = {"num_labels": 3}
WINDOWS: Config = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
STAGES: Config = {"image_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}
#: two stages with strides of 4 and 2
PYRAMID: Config = {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [32, 64], "num_attention_heads": [2, 4],
    "strides": [4, 2], "mlp_ratios": [2, 2]}
DETECTOR: Config = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 5,
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "out_features": ["stage2"]},
}
LARGE_IMAGE = {"pixel_values": floats(2, 3, 64, 64)}


def video(frames: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": floats(1, frames, 3, 32, 32)}


IMAGES = [
    Family("ViTForImageClassification", VISION | LABELS, IMAGE, head="classifier"),
    Family("DeiTForImageClassification", VISION | LABELS, IMAGE, head="classifier"),
    Family("BeitForImageClassification", VISION | LABELS, IMAGE, head="classifier"),
    Family("Dinov2ForImageClassification", VISION | LABELS, IMAGE, head="classifier"),
    Family("Dinov2WithRegistersForImageClassification", VISION | LABELS, IMAGE, head="classifier"),
    Family("DINOv3ViTModel", VISION, IMAGE),
    Family("ViTMSNForImageClassification", VISION | LABELS, IMAGE, head="classifier"),
    Family("ViTForMaskedImageModeling", VISION | {"encoder_stride": 8}, IMAGE, head="decoder"),
    Family("ViTMAEForPreTraining", VISION | {"decoder_hidden_size": 64, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 128}, IMAGE, head="decoder_pred"),
    Family("SwinForImageClassification", WINDOWS | LABELS, IMAGE, head="classifier"),
    Family("Swinv2ForImageClassification", WINDOWS | LABELS, IMAGE, head="classifier"),
    Family("DonutSwinModel", WINDOWS, IMAGE),
    Family("ConvNextForImageClassification", STAGES | LABELS, IMAGE, head="classifier"),
    Family("ConvNextV2ForImageClassification", STAGES | LABELS, IMAGE, head="classifier"),
    Family("SegformerForSemanticSegmentation", PYRAMID | LABELS | {"decoder_hidden_size": 64, "sr_ratios": [2, 1], "patch_sizes": [7, 3]}, IMAGE,
        head="decode_head"),
    Family("PvtForImageClassification", PYRAMID | LABELS | {"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]}, IMAGE, head="classifier"),
    Family("LevitForImageClassification", LABELS | {"image_size": 32, "hidden_sizes": [32, 64, 64], "num_attention_heads": [2, 2, 2], "depths": [1,
        1, 1], "key_dim": [16, 16, 16]}, IMAGE, head="classifier"),
    Family("MobileViTForImageClassification", LABELS | {"image_size": 32, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 32, 32, 32, 32,
        64], "num_attention_heads": 4}, IMAGE, head="classifier"),
    Family("HieraForImageClassification", LABELS | {"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [4, 4], "patch_padding": [1, 1],
        "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]}, IMAGE,
        head="classifier"),
    Family("FocalNetForImageClassification", LABELS | {"image_size": 32, "embed_dim": 32, "hidden_sizes": [32, 64], "depths": [1, 1],
        "focal_levels": [1, 1], "focal_windows": [3, 3], "patch_size": 4}, IMAGE, head="classifier"),
    Family("CLIPVisionModel", VISION, IMAGE),
    Family("SiglipVisionModel", VISION, IMAGE),
    Family("DPTForDepthEstimation", VISION | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16],
        "fusion_hidden_size": 16, "is_hybrid": False}, IMAGE, head="head"),
    Family("YolosForObjectDetection", VISION | {"image_size": [32, 32], "num_detection_tokens": 5}, IMAGE, head="class_labels_classifier"),
    Family("DetrForObjectDetection", DETECTOR, LARGE_IMAGE, head="class_labels_classifier"),
    Family("SamModel", {"vision_config": VISION | {"output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16,
        "image_size": 64, "patch_size": 16}, "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "iou_head_hidden_dim": 32}},
        {"pixel_values": floats(1, 3, 64, 64), "input_points": torch.tensor([[[[3.0, 5.0]]]])}, head="mask_decoder.iou_prediction_head"),
    Family("ImageGPTForCausalImageModeling", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    Family("VideoMAEForVideoClassification", VISION | LABELS | {"num_frames": 4, "tubelet_size": 2}, video(4), head="classifier"),
    Family("TimesformerForVideoClassification", VISION | LABELS | {"num_frames": 2}, video(2), head="classifier"),
    Family("VivitForVideoClassification", VISION | LABELS | {"num_frames": 4, "tubelet_size": [2, 8, 8]}, video(4), head="classifier"),
]

# --- sounds and series ------------------------------------------------------------------------------------------------

WAVES: Config = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "conv_dim": [32, 32],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
}
WAVE = {"input_values": floats(2, 800)}
SPEECH: Config = ENCODER_DECODER | {"num_mel_bins": 16, "max_target_positions": 32}
MUSIC: Config = {"vocab_size": 32, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_codebooks": 2,
    "pad_token_id": 31, "bos_token_id": 31}
BARK: Config = {"hidden_size": 64, "num_layers": 1, "num_heads": 4, "input_vocab_size": 96, "output_vocab_size": 96, "block_size": 32}
CODEBOOKS = TOKENS.repeat(2, 1)

SOUNDS = [
    Family("Wav2Vec2ForCTC", WAVES, WAVE, head="lm_head"),
    Family("HubertForCTC", WAVES, WAVE, head="lm_head"),
    Family("WavLMForCTC", WAVES | {"num_buckets": 32, "max_bucket_distance": 64}, WAVE, head="lm_head"),
    Family("UniSpeechForCTC", WAVES, WAVE, head="lm_head"),
    Family("UniSpeechSatForCTC", WAVES, WAVE, head="lm_head"),
    Family("SEWForCTC", WAVES | {"squeeze_factor": 2}, WAVE, head="lm_head"),
    Family("SEWDForCTC", WAVES | {"squeeze_factor": 2}, WAVE, head="lm_head"),
    Family("Data2VecAudioForCTC", WAVES | {"num_conv_pos_embeddings": 2}, WAVE, head="lm_head"),
    Family("Wav2Vec2ConformerForCTC", WAVES, WAVE, head="lm_head"),
    Family("Wav2Vec2BertForCTC", WAVES | {"feature_projection_input_dim": 32}, {"input_features": floats(2, 12, 32)}, head="lm_head"),
    Family("Wav2Vec2ForSequenceClassification", WAVES | LABELS | {"classifier_proj_size": 32}, WAVE, head="classifier"),
    Family("ASTForAudioClassification", VISION | LABELS | {"num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8},
        {"input_values": floats(2, 24, 16)}, head="classifier"),
    Family("ParakeetForCTC", {"vocab_size": 32, "pad_token_id": 0, "encoder_config": {"hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 128, "num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 16}},
        {"input_features": floats(2, 32, 16)}, head="ctc_head"),
    Family("WhisperForConditionalGeneration", SPEECH | {"max_source_positions": 12}, {"input_features": floats(2, 16, 24),
        "decoder_input_ids": TOKENS}),
    Family("Speech2TextForConditionalGeneration", SPEECH | {"input_feat_per_channel": 16, "max_source_positions": 40, "conv_channels": 32},
        {"input_features": floats(2, 24, 16), "decoder_input_ids": TOKENS}),
    Family("MoonshineForConditionalGeneration", TEXT | {"decoder_start_token_id": 1, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        {"input_values": floats(2, 2000), "decoder_input_ids": TOKENS}),
    Family("SpeechT5ForSpeechToText", WAVES | {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 2}, WAVE | {"decoder_input_ids": TOKENS}),
    Family("SeamlessM4TForTextToText", {"vocab_size": 96, "hidden_size": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
        "speech_encoder_layers": 1, "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 128, "adaptor_kernel_size": 4,
        "t2u_vocab_size": 96}, BOTH),
    Family("ClapModel", {"text_config": TEXT, "audio_config": {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1],
        "num_attention_heads": [2, 2], "num_hidden_layers": 2, "window_size": 4, "spec_size": 32, "num_mel_bins": 8, "patch_size": 4,
        "patch_stride": [4, 4], "num_classes": 4}, "projection_dim": 64}, {"input_ids": TOKENS, "input_features": floats(2, 1, 32, 8)},
        head="text_projection"),
    Family("MusicgenForConditionalGeneration", {"text_encoder": {"model_type": "t5"} | ENCODER_DECODER, "audio_encoder": {"model_type": "encodec",
        "num_filters": 4, "upsampling_ratios": [2, 2], "hidden_size": 16, "codebook_dim": 16, "codebook_size": 32}, "decoder": MUSIC},
        {"input_ids": TOKENS, "decoder_input_ids": CODEBOOKS}, head="decoder.lm_heads.0"),
    Family("MusicgenForCausalLM", MUSIC, {"input_ids": CODEBOOKS}, head="lm_heads.0"),
    Family("BarkSemanticModel", BARK),
    Family("BarkFineModel", BARK | {"input_vocab_size": 40, "output_vocab_size": 40, "n_codes_total": 3, "n_codes_given": 1},
        {"codebook_idx": torch.tensor(1), "input_ids": torch.arange(36).reshape(2, 6, 3)}, head="lm_heads.0", embedding="input_embeds_layers.0"),
    Family("VitsModel", {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 128, "flow_size": 32,
        "spectrogram_bins": 33, "upsample_initial_channel": 32, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}, {"input_ids": TOKENS}),
    Family("PatchTSTForPrediction", {"d_model": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "context_length": 32,
        "prediction_length": 8, "num_input_channels": 2, "patch_length": 4, "patch_stride": 4}, {"past_values": floats(2, 32, 2)}, head="head"),
    Family("TimeSeriesTransformerForPrediction", {"d_model": 64, "prediction_length": 4, "context_length": 8, "lags_sequence": [1],
        "num_time_features": 1, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}, {"past_values": floats(2,
        9), "past_time_features": floats(2, 9, 1), "past_observed_mask": torch.ones(2, 9), "future_values": floats(2, 4),
        "future_time_features": floats(2, 4, 1)}, head="parameter_projection"),
    Family("DecisionTransformerModel", {"state_dim": 4, "act_dim": 3, "hidden_size": 64, "n_layer": 2, "n_head": 4, "max_ep_len": 32},
        {"states": floats(2, 5, 4), "actions": floats(2, 5, 3), "rewards": floats(2, 5, 1), "returns_to_go": floats(2, 5, 1),
        "timesteps": torch.arange(5).repeat(2, 1), "attention_mask": torch.ones(2, 5)}, head="predict_action", embedding="embed_timestep"),
]

# --- several at once --------------------------------------------------------------------------------------------------

#: an image of 32 × 32 as 16 patches of 8 × 8
CLIP: Config = {"model_type": "clip_vision_model"} | VISION
SIGLIP: Config = {"model_type": "siglip_vision_model"} | VISION
TWO_TOWERS: Config = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 64}
QFORMER: Config = {
    "text_config": {"model_type": "opt", "word_embed_proj_dim": 64, "ffn_dim": 128} | TEXT,
    "vision_config": VISION,
    "qformer_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "encoder_hidden_size": 64,
        "vocab_size": 96},
    "num_query_tokens": 4,
    "image_token_index": PIECE,
}
#: one image of 4 × 4 patches of 8 × 8 in two frames, which two by two become four pieces
MERGED = with_pieces(4, pixel_values=floats(32, 384), image_grid_thw=torch.tensor([[1, 4, 4]] * 2), mm_token_type_ids=torch.tensor([[0, 1, 1, 1, 1,
    0, 0]] * 2))
MROPE: Config = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
MERGING: Config = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 64}
MARKS: Config = {"image_token_id": PIECE, "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
DEEPSTACK: Config = MERGING | {"out_hidden_size": 64, "intermediate_size": 128, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
WHISPER: Config = {"num_mel_bins": 16, "max_source_positions": 12}


def language_model(name: str) -> Config:
    return {"model_type": name} | TEXT


SEVERAL = [
    Family("CLIPModel", TWO_TOWERS, IMAGE_AND_TEXT, head="text_projection"),
    Family("SiglipModel", {"text_config": TEXT | {"projection_size": 64}, "vision_config": VISION}, IMAGE_AND_TEXT, head="text_model.head"),
    Family("Siglip2Model", {"text_config": TEXT | {"projection_size": 64}, "vision_config": VISION | {"num_patches": 16}}, {"input_ids": TOKENS,
        "pixel_values": floats(2, 16, 192), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4], [4,
        4]])}, head="text_model.head"),
    Family("ChineseCLIPModel", TWO_TOWERS, IMAGE_AND_TEXT, head="text_projection"),
    Family("AltCLIPModel", TWO_TOWERS | {"text_config": TEXT | {"project_dim": 64}}, IMAGE_AND_TEXT, head="text_projection"),
    Family("CLIPSegForImageSegmentation", TWO_TOWERS | {"reduce_dim": 32, "extract_layers": [0, 1], "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64}, IMAGE_AND_TEXT, head="clip.text_projection"),
    Family("GroupViTModel", TWO_TOWERS | {"vision_config": VISION | {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4,
        4]}}, IMAGE_AND_TEXT, head="text_projection"),
    Family("XCLIPModel", TWO_TOWERS | {"vision_config": VISION | {"mit_hidden_size": 64, "mit_intermediate_size": 128, "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 4, "num_frames": 2}, "prompt_layers": 1, "prompt_num_attention_heads": 4}, {"input_ids": TOKENS,
        "pixel_values": floats(2, 2, 3, 32, 32)}, head="text_projection"),
    Family("OwlViTForObjectDetection", TWO_TOWERS, IMAGE_AND_TEXT, head="class_head"),
    Family("BlipForConditionalGeneration", TWO_TOWERS | {"text_config": TEXT | {"encoder_hidden_size": 64}}, IMAGE_AND_TEXT),
    Family("BlipModel", TWO_TOWERS | {"text_config": TEXT | {"encoder_hidden_size": 64}}, IMAGE_AND_TEXT, head="text_projection"),
    Family("ViltForQuestionAnswering", TEXT | VISION | {"num_images": -1, "num_labels": 5}, IMAGE_AND_TEXT, head="classifier"),
    Family("FlavaModel", {"text_config": TEXT, "image_config": VISION, "multimodal_config": VISION, "hidden_size": 64, "projection_dim": 64},
        IMAGE_AND_TEXT, head="text_projection"),
    Family("BridgeTowerModel", {"text_config": TEXT, "vision_config": VISION, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        {**IMAGE_AND_TEXT, "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}, head="cross_modal_text_pooler"),
    Family("LayoutLMv3ForTokenClassification", TEXT | LABELS | {"visual_embed": True, "input_size": 32, "patch_size": 8,
        "max_2d_position_embeddings": 64, "coordinate_size": 10, "shape_size": 12}, {**IMAGE_AND_TEXT, "bbox": torch.zeros(2, 6, 4,
        dtype=torch.long)}, head="classifier"),
    Family("LxmertModel", TEXT | {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32}, {"input_ids": TOKENS,
        "visual_feats": floats(2, 4, 32), "visual_pos": floats(2, 4, 4)}, head="pooler"),
    Family("VisualBertModel", TEXT | {"visual_embedding_dim": 32}, {"input_ids": TOKENS, "visual_embeds": floats(2, 4, 32)}, head="pooler"),
    Family("UdopForConditionalGeneration", ENCODER_DECODER | {"max_2d_position_embeddings": 64, "image_size": 32, "patch_size": 8}, {**BOTH,
        "bbox": torch.zeros(2, 6, 4)}),
    Family("VisionEncoderDecoderModel", {"encoder": {"model_type": "vit"} | VISION, "decoder": {"model_type": "trocr", "is_decoder": True,
        "add_cross_attention": True, "cross_attention_hidden_size": 64} | ENCODER_DECODER, "decoder_start_token_id": 2, "pad_token_id": 0}, {**IMAGE,
        "decoder_input_ids": TOKENS}),
    Family("TrOCRForCausalLM", ENCODER_DECODER),
    Family("Pix2StructForConditionalGeneration", {"text_config": {"vocab_size": 96, "hidden_size": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
        "num_heads": 4, "decoder_start_token_id": 0}, "vision_config": {"hidden_size": 64, "patch_embed_hidden_size": 192, "d_ff": 128, "d_kv": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 64}}, {"flattened_patches": floats(2, 8, 194).abs(),
        "decoder_input_ids": TOKENS}),
    Family("GitForCausalLM", TEXT | {"vision_config": VISION, "num_image_with_embedding": None}, IMAGE_AND_TEXT),
    Family("Kosmos2ForConditionalGeneration", {"text_config": {"vocab_size": 96, "embed_dim": 64, "layers": 2, "ffn_dim": 128, "attention_heads": 4,
        "max_position_embeddings": 64}, "vision_config": VISION, "latent_query_num": 2}, {**IMAGE_AND_TEXT,
        "image_embeds_position_mask": torch.tensor([[0, 1, 1, 0, 0, 0]] * 2)}),
    Family("Florence2ForConditionalGeneration", {"text_config": {"model_type": "bart"} | ENCODER_DECODER, "vision_config": {"depths": [1, 1],
        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4],
        "window_size": 4, "projection_dim": 64}, "image_token_id": PIECE}, BOTH),
    Family("LlavaForConditionalGeneration", {"text_config": language_model("llama"), "vision_config": CLIP, "image_token_index": PIECE,
        "vision_feature_layer": -1}, with_pieces(16, **IMAGE)),
    Family("LlavaNextForConditionalGeneration", {"text_config": language_model("llama"), "vision_config": CLIP, "image_token_index": PIECE,
        "vision_feature_layer": -1, "image_grid_pinpoints": [[32, 32]]}),
    Family("LlavaOnevisionForConditionalGeneration", {"text_config": language_model("qwen2"), "vision_config": SIGLIP, "image_token_index": PIECE,
        "vision_feature_layer": -1}),
    Family("PaliGemmaForConditionalGeneration", {"text_config": language_model("gemma"), "vision_config": SIGLIP, "image_token_index": PIECE,
        "projection_dim": 64, "hidden_size": 64}, with_pieces(16, **IMAGE)),
    Family("Qwen2VLForConditionalGeneration", {"text_config": MROPE, "vision_config": MERGING | {"embed_dim": 64, "mlp_ratio": 2}, **MARKS}, MERGED),
    Family("Qwen2_5_VLForConditionalGeneration", {"text_config": MROPE, "vision_config": MERGING | {"out_hidden_size": 64, "intermediate_size": 128,
        "window_size": 32, "fullatt_block_indexes": [1]}, **MARKS}, MERGED),
    Family("Qwen3VLForConditionalGeneration", {"text_config": MROPE, "vision_config": DEEPSTACK, **MARKS}, MERGED),
    Family("Qwen3VLMoeForConditionalGeneration", {"text_config": EXPERTS | MROPE, "vision_config": DEEPSTACK, **MARKS}, MERGED),
    Family("Gemma3ForConditionalGeneration", {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": PIECE,
        "boi_token_index": 91, "eoi_token_index": 92}, with_pieces(4, **IMAGE)),
    Family("Llama4ForConditionalGeneration", {"text_config": EXPERTS | {"intermediate_size_mlp": 128},
        "vision_config": VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "intermediate_size": 256}},
            linears=LLAMA_LINEARS),
    Family("Mistral3ForConditionalGeneration", {"text_config": language_model("mistral"), "vision_config": {"model_type": "pixtral"} | VISION,
        "image_token_index": PIECE}, with_pieces(4, **IMAGE, image_sizes=torch.tensor([[32, 32]] * 2))),
    Family("AyaVisionForConditionalGeneration", {"text_config": language_model("cohere2"), "vision_config": SIGLIP, "image_token_index": PIECE,
        "adapter_layer_norm_eps": 1e-6}, with_pieces(4, **IMAGE)),
    Family("Idefics2ForConditionalGeneration", {"text_config": language_model("mistral"), "vision_config": VISION, "image_token_id": PIECE,
        "perceiver_config": {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 16,
        "num_key_value_heads": 2}}, with_pieces(4, pixel_values=floats(2, 1, 3, 32, 32))),
    Family("Idefics3ForConditionalGeneration", {"text_config": language_model("llama"), "vision_config": VISION, "image_token_id": PIECE,
        "scale_factor": 2}, with_pieces(4, pixel_values=floats(2, 1, 3, 32, 32))),
    Family("SmolVLMForConditionalGeneration", {"text_config": language_model("llama"), "vision_config": VISION, "image_token_id": PIECE,
        "scale_factor": 2}, with_pieces(4, pixel_values=floats(2, 1, 3, 32, 32))),
    Family("InternVLForConditionalGeneration", {"text_config": language_model("qwen2"), "vision_config": VISION | {"image_size": [32, 32],
        "patch_size": [8, 8]}, "image_token_id": PIECE, "downsample_ratio": 0.5}, with_pieces(4, **IMAGE)),
    Family("Blip2ForConditionalGeneration", QFORMER, with_pieces(4, **IMAGE)),
    Family("InstructBlipForConditionalGeneration", QFORMER, with_pieces(4, **IMAGE, qformer_input_ids=TOKENS)),
    Family("MllamaForConditionalGeneration", {"text_config": TEXT | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default",
        "rope_theta": 10000.0}}, "vision_config": VISION | {"num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 128,
        "intermediate_layers_indices": [1], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}, "image_token_index": PIECE}),
    Family("ChameleonForConditionalGeneration", TEXT | {"vq_config": {"embed_dim": 16, "num_embeddings": 32, "latent_channels": 16,
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 32},
        "vocabulary_map": {"<image>": PIECE} | {f"IMGIMGBS{chr(65 + i)}Z": i for i in range(8)}}),
    Family("Qwen2AudioForConditionalGeneration", {"text_config": language_model("qwen2"), "audio_config": WHISPER | {"d_model": 64,
        "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}, "audio_token_index": PIECE}),
    Family("VoxtralForConditionalGeneration", {"text_config": language_model("llama"), "audio_config": WHISPER | {"hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}, "audio_token_id": PIECE, "hidden_size": 64}),
]
