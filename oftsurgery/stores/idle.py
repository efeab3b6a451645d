"""Idle layers: the owner of such a layer reads its weight and never calls the layer. A live adapter on it does nothing,
so a fold must do nothing either.

peft puts its own layer in the place of the target layer, and code that reads ``layer.weight`` gets the base's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

#: attribute → classes of transformers that read the layer's weight and never call it; tests/stores/test_idle.py looks for more
_READ: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        name: frozenset(owners.split())
        for names, owners in {
            "classifier": "LongcatFlashTopkRouter",
            "cls_embed": "Sam3GeometryEncoder Sam3LiteTextGeometryEncoder",
            "decoder dense": "MobileBertLMPredictionHead",
            "dt_proj": "FalconMambaMixer JambaMambaMixer MambaMixer",
            "embed_positions": "AudioFlamingo3Encoder MossTranscribeDiarizeAudioModel Qwen2AudioEncoder VoxtralEncoder",
            "embed_tokens": "SeamlessM4Tv2TextToUnitDecoder",
            "embedding": "Emu3VQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer",
            "hq_token": "SamHQMaskDecoder",
            "iou_token mask_tokens": "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder "
            "Sam3TrackerMaskDecoder Sam3TrackerVideoMaskDecoder SamHQMaskDecoder SamMaskDecoder",
            "k_linear": "DabDetrMHAttentionMap",
            "k_proj": "ConditionalDetrMHAttentionMap DetrMHAttentionMap MaskFormerDetrMHAttentionMap WavLMAttention",
            "kernel": "TDNNLayer",
            "level_embed": "Mask2FormerTransformerModule OneFormerTransformerModule",
            "ngram_embeddings": "ProphetNetDecoder",
            "no_mask_embed not_a_point_embed": "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder "
            "Sam2VideoPromptEncoder Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder SamHQPromptEncoder SamPromptEncoder",
            "obj_score_token": "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder "
            "Sam3TrackerMaskDecoder Sam3TrackerVideoMaskDecoder",
            "out_proj q_proj v_proj": "WavLMAttention",
            "patterns query_refpoint_embeddings": "DabDetrModel",
            "position_embedding": "Cosmos3EdgeVisionEmbeddings Glm4vMoeVisionEmbeddings Glm4vVisionEmbeddings GlmImageVisionEmbeddings "
            "HunYuanVLVisionPatchEmbed Siglip2VisionEmbeddings",
            "presence_token": "Sam3DetrDecoder Sam3LiteTextDetrDecoder",
            "prompt_ctx": "OneFormerTextMapper",
            "queries_embedder": "Mask2FormerTransformerModule MaskFormerTransformerModule OneFormerTransformerModule",
            "queries_features": "Mask2FormerTransformerModule",
            "query": "EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation VideomtForUniversalSegmentation",
            "query_1024_resolution query_768_resolution": "DeepseekOcr2VisionModel",
            "query_embed": "Sam3DetrDecoder Sam3LiteTextDetrDecoder",
            "query_feat reference_point_embed": "LwDetrModel RfDetrModel",
            "query_position_embeddings": "ConditionalDetrModel DeformableDetrModel DetrModel GroundingDinoModel MMGroundingDinoModel "
            "TableTransformerModel",
            "reference_points": "GroundingDinoModel Sam3DetrDecoder Sam3LiteTextDetrDecoder",
            "rel_embeddings": "DebertaEncoder DebertaV2Encoder SEWDTransformerEncoder",
            "rel_pos_bias rel_pos_x_bias rel_pos_y_bias": "LayoutLMv2Encoder LayoutLMv3Encoder PPDocLayoutV2ReadingOrderEncoder",
            "tgt_embed": "OmDetTurboDecoder",
            "unembedding_projection": "NeoMMEForMaskedLM",
        }.items()
        for name in names.split()
    }
)
#: classes that call the layer only in models that were loaded quantised
_CALLED_WHERE_QUANTISED = frozenset({"FalconMambaMixer", "JambaMambaMixer"})


def is_idle(modules: Mapping[str, nn.Module], path: str, *, quantised: bool) -> bool:
    """Whether the owner of the module at ``path`` never calls the module.

    Args:
        modules: ``{path: module}`` of the model.
        quantised: whether the model was loaded through a quantiser.
    """
    if isinstance(modules.get(path), nn.modules.linear.NonDynamicallyQuantizableLinear):
        return True  # nn.MultiheadAttention's out_proj
    above, _, name = path.rpartition(".")
    owners = {c.__name__ for c in type(modules.get(above)).__mro__}
    if quantised and owners & _CALLED_WHERE_QUANTISED:
        return False
    return bool(owners & _READ.get(name, frozenset()))
