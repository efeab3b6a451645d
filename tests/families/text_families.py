"""Families that take text alone: decoders, mixtures of experts, state-space models, encoder-decoders, encoders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from family import (
    BOTH,
    ENCODER_DECODER,
    EXPERTS,
    LATENT,
    LLAMA_LINEARS,
    STATE_SPACE,
    TEXT,
    TEXTS,
    TOKENS,
    Config,
    Family,
)
from torch import Tensor

# the formatter would spread each row over many lines
# fmt: off
#: sizes of models whose heads do not share keys
UNGROUPED: Config = TEXT | {"num_key_value_heads": 4}


def without(sizes: Config, *names: str) -> Config:
    return {name: size for name, size in sizes.items() if name not in names}


def plain_rows(config: Config, names: str, inputs: Mapping[str, Tensor] = TEXTS) -> list[Family]:
    return [Family(name, config, inputs) for name in names.split()]


DECODERS = [
    *plain_rows(
        TEXT,
        "LlamaForCausalLM MistralForCausalLM MinistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM "
        "Gemma2ForCausalLM Gemma3ForCausalLM VaultGemmaForCausalLM PhiForCausalLM Phi3ForCausalLM BloomForCausalLM "
        "GPTNeoXForCausalLM MptForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM CohereForCausalLM Cohere2ForCausalLM "
        "Starcoder2ForCausalLM StableLmForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM "
        "GraniteForCausalLM NemotronForCausalLM PersimmonForCausalLM GlmForCausalLM Glm4ForCausalLM "
        "SmolLM3ForCausalLM Exaone4ForCausalLM HeliumForCausalLM ArceeForCausalLM SeedOssForCausalLM "
        "Ernie4_5ForCausalLM ApertusForCausalLM DiffLlamaForCausalLM BioGptForCausalLM OpenAIGPTLMHeadModel "
        "XLMWithLMHeadModel HunYuanDenseV1ForCausalLM ModernBertDecoderForCausalLM NanoChatForCausalLM "
        "BitNetForCausalLM HrmTextForCausalLM HyperCLOVAXForCausalLM",
    ),
    Family("OPTForCausalLM", TEXT | {"word_embed_proj_dim": 32, "ffn_dim": 128}),
    Family("GPTJForCausalLM", TEXT | {"rotary_dim": 8}),
    Family("CodeGenForCausalLM", TEXT | {"rotary_dim": 8}),
    Family("GPTNeoForCausalLM", TEXT | {"attention_types": [[["global", "local"], 1]]}),
    Family("FalconForCausalLM", without(TEXT, "head_dim")),
    Family("XLNetLMHeadModel", without(TEXT, "max_position_embeddings", "head_dim") | {"d_head": 16, "d_inner": 128}),
    Family("XGLMForCausalLM", TEXT | {"ffn_dim": 128}),
    Family("CTRLLMHeadModel", TEXT | {"dff": 128}),
    Family("MiniCPM3ForCausalLM", TEXT | LATENT),
    Family("YoutuForCausalLM", TEXT | LATENT),
    Family(
        "Gemma3nForCausalLM",
        TEXT
        | {
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    Family(
        "Gemma4ForCausalLM",
        TEXT
        | {
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 16,
            "global_head_dim": 16,
        },
    ),
    Family("LlamaForSequenceClassification", TEXT | {"num_labels": 3}, head="score"),
    Family("Qwen2ForTokenClassification", TEXT | {"num_labels": 3}, head="score"),
    Family("GPT2ForSequenceClassification", TEXT | {"num_labels": 3}, head="score"),
    Family("Qwen3Model", TEXT),
]

MIXTURES = [
    *plain_rows(
        EXPERTS,
        "MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM PhimoeForCausalLM "
        "GraniteMoeForCausalLM GraniteMoeSharedForCausalLM Ernie4_5_MoeForCausalLM Glm4MoeForCausalLM "
        "GptOssForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM Dots1ForCausalLM HunYuanMoEV1ForCausalLM "
        "JetMoeForCausalLM FlexOlmoForCausalLM AfmoeForCausalLM DogeForCausalLM SolarOpenForCausalLM",
    ),
    *plain_rows(
        EXPERTS | LATENT,
        "DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM LongcatFlashForCausalLM",
    ),
    Family("Llama4ForCausalLM", EXPERTS | {"intermediate_size_mlp": 128}, linears=LLAMA_LINEARS),
    Family("Lfm2MoeForCausalLM", EXPERTS | {"layer_types": ["conv", "full_attention"]}),
    Family(
        "Qwen3NextForCausalLM",
        EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
]

STATE_SPACES = [
    Family("MambaForCausalLM", STATE_SPACE, linears=("in_proj", "x_proj", "dt_proj")),
    Family("Mamba2ForCausalLM", STATE_SPACE, linears=("in_proj",)),
    Family("FalconMambaForCausalLM", STATE_SPACE, linears=("in_proj", "x_proj", "dt_proj")),
    Family("JambaForCausalLM", STATE_SPACE | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16}),
    Family("BambaForCausalLM", STATE_SPACE | {"attn_layer_indices": [1]}),
    Family("FalconH1ForCausalLM", STATE_SPACE | {"mamba_d_ssm": 128}),
    Family("GraniteMoeHybridForCausalLM", STATE_SPACE | EXPERTS | {"layer_types": ["mamba", "attention"]}),
    Family("ZambaForCausalLM", STATE_SPACE | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 2,
        "mamba_dt_rank": 16, "attention_head_dim": 32}),
    Family("Zamba2ForCausalLM", STATE_SPACE | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1,
        2], "num_mem_blocks": 1, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "attention_head_dim": 32}),
    Family("RwkvForCausalLM", STATE_SPACE | {"attention_hidden_size": 64}),
    Family("xLSTMForCausalLM", TEXT | {"num_heads": 2, "num_blocks": 2, "chunk_size": 16, "qk_dim_factor": 1.0, "mode": "inference",
        "return_last_states": True}),
    Family("NemotronHForCausalLM", STATE_SPACE | EXPERTS | {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8,
        "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "moe_shared_expert_intermediate_size": 32}),
    Family("OlmoHybridForCausalLM", STATE_SPACE | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}),
    Family("Lfm2ForCausalLM", TEXT | {"layer_types": ["conv", "full_attention"]}),
    Family("RecurrentGemmaForCausalLM", TEXT | {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 16}),
]

ENCODER_DECODERS = [
    *plain_rows(
        ENCODER_DECODER,
        "T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration "
        "LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration BartForConditionalGeneration "
        "MBartForConditionalGeneration PegasusForConditionalGeneration PegasusXForConditionalGeneration "
        "BigBirdPegasusForConditionalGeneration BlenderbotForConditionalGeneration "
        "BlenderbotSmallForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration "
        "NllbMoeForConditionalGeneration MvpForConditionalGeneration PLBartForConditionalGeneration",
        BOTH,
    ),
    Family("LEDForConditionalGeneration", ENCODER_DECODER | {"attention_window": 4, "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64}, BOTH),
    Family("FSMTForConditionalGeneration", ENCODER_DECODER | {"src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["en", "de"]}, BOTH),
    Family("ProphetNetForConditionalGeneration", without(TEXT, "num_hidden_layers") | {"num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "decoder_start_token_id": 2}, BOTH),
    Family("T5GemmaForConditionalGeneration", {"encoder": TEXT, "decoder": TEXT | {"cross_attention_hidden_size": 64}, "vocab_size": 96,
        "decoder_start_token_id": 2}, BOTH),
    Family("EncoderDecoderModel", {"encoder": {"model_type": "bert"} | UNGROUPED, "decoder": {"model_type": "bert", "is_decoder": True,
        "add_cross_attention": True} | UNGROUPED, "decoder_start_token_id": 2, "pad_token_id": 0}, BOTH),
    Family("BartForSequenceClassification", ENCODER_DECODER | {"num_labels": 3}, {"input_ids": torch.cat([TOKENS.where(TOKENS != 2, 14),
        TOKENS.new_full((2, 1), 2)], dim=1)}, head="classification_head"),
]

ENCODERS = [
    *plain_rows(
        UNGROUPED,
        "BertForMaskedLM RobertaForMaskedLM ElectraForMaskedLM AlbertForMaskedLM XLMRobertaForMaskedLM "
        "XLMRobertaXLForMaskedLM CamembertForMaskedLM ModernBertForMaskedLM NomicBertForMaskedLM GteForMaskedLM "
        "JinaEmbeddingsV3ForMaskedLM EuroBertForMaskedLM MPNetForMaskedLM ConvBertForMaskedLM FNetForMaskedLM "
        "BigBirdForMaskedLM ErnieForMaskedLM EsmcForMaskedLM IBertForMaskedLM LayoutLMForMaskedLM "
        "MegatronBertForMaskedLM MraForMaskedLM NystromformerForMaskedLM RemBertForMaskedLM RoFormerForMaskedLM "
        "RobertaPreLayerNormForMaskedLM YosoForMaskedLM Data2VecTextForMaskedLM FlaubertWithLMHeadModel "
        "UltrabertForMaskedLM BertModel BertForPreTraining BertGenerationDecoder CLIPTextModel SplinterModel",
    ),
    Family("DebertaForMaskedLM", UNGROUPED | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Family("DebertaV2ForMaskedLM", UNGROUPED | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Family("EsmForMaskedLM", UNGROUPED | {"mask_token_id": 3}),
    Family("DistilBertForMaskedLM", UNGROUPED | {"hidden_dim": 128}),
    Family("MobileBertForMaskedLM", UNGROUPED | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    Family("SqueezeBertForMaskedLM", UNGROUPED | {"embedding_size": 64}),
    Family("FunnelForMaskedLM", without(UNGROUPED, "num_hidden_layers") | {"block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16,
        "d_inner": 128}),
    Family("LongformerForMaskedLM", UNGROUPED | {"attention_window": 4}),
    Family("LukeForMaskedLM", UNGROUPED | {"entity_vocab_size": 16, "entity_emb_size": 16}),
    Family("XmodForMaskedLM", UNGROUPED | {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"}),
    Family("TapasForMaskedLM", UNGROUPED | {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 2]}),
    Family("RoCBertForMaskedLM", UNGROUPED | {"pronunciation_vocab_size": 32, "shape_vocab_size": 32}),
    Family("ReformerForMaskedLM", UNGROUPED | {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"],
        "is_decoder": False, "feed_forward_size": 128, "attention_head_size": 16, "num_buckets": 2, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8}),
    Family("PerceiverForMaskedLM", {"vocab_size": 96, "num_latents": 8, "d_latents": 64, "d_model": 64, "num_blocks": 1,
        "num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 64, "v_channels": 64,
        "max_position_embeddings": 6}),
    Family("LiltModel", UNGROUPED | {"channel_shrink_ratio": 2, "max_2d_position_embeddings": 64, "hidden_size": 96}),
    Family("BrosModel", UNGROUPED | {"dim_bbox": 8}, {"input_ids": TOKENS, "bbox": torch.zeros(2, 6, 4)}),
    Family("MarkupLMModel", UNGROUPED | {"max_xpath_tag_unit_embeddings": 16, "max_xpath_subs_unit_embeddings": 16, "tag_pad_id": 15,
        "subs_pad_id": 15, "max_depth": 4, "xpath_unit_hidden_size": 16}),
    Family("CanineModel", UNGROUPED | {"num_hash_buckets": 32, "num_hash_functions": 4, "local_transformer_stride": 4, "downsampling_rate": 2,
        "upsampling_kernel_size": 4}),
    Family("BertForSequenceClassification", UNGROUPED | {"num_labels": 3}, head="classifier"),
    Family("RobertaForSequenceClassification", UNGROUPED | {"num_labels": 3}, head="classifier"),
    Family("DebertaV2ForTokenClassification", UNGROUPED | {"num_labels": 3}, head="classifier"),
    Family("ModernBertForSequenceClassification", UNGROUPED | {"num_labels": 3}, head="classifier"),
    Family("BertForQuestionAnswering", UNGROUPED, head="qa_outputs"),
]
