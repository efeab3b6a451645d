"""The two layouts of image models: the original one of checkpoints in a single file, and that of diffusers.

The layouts name the same rows otherwise: the original layout fuses projections, and stores the halves (shift, scale) of some
modulations in the other order. The functions read names alone, so a part of a model is enough.

=============== =================================================================================================
family          original ↔ diffusers
=============== =================================================================================================
U-Nets          ``input_blocks.4.1.proj_in`` ↔ ``down_blocks.1.attentions.0.proj_in`` (SD 1, SD 2, SDXL)
Flux            ``double_blocks.0.img_attn.qkv`` ↔ ``transformer_blocks.0.attn.to_q | to_k | to_v``
SD3             ``joint_blocks.0.x_block.attn.qkv`` ↔ ``transformer_blocks.0.attn.to_q | to_k | to_v``
Qwen-Image      the names are the same
OpenCLIP        ``transformer.resblocks.0.attn.in_proj`` ↔ ``text_model.encoder.layers.0.self_attn.q_proj | k_proj | v_proj`` (transformers)
=============== =================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One module of the original layout, and the modules of diffusers that hold its rows, in the order of the rows.

    >>> (pair,) = pairs_of(["double_blocks.0.img_attn.qkv"])
    >>> pair.parts
    ('transformer_blocks.0.attn.to_q', 'transformer_blocks.0.attn.to_k', 'transformer_blocks.0.attn.to_v')

    Attributes:
        original: the path in the original layout.
        parts: the paths in diffusers' layout.
        swapped: whether the two halves of the rows are in the other order in diffusers' layout.
    """

    original: str
    parts: tuple[str, ...]
    swapped: bool = False


def _projections(attention: str, *ends: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{end}" for end in ends)


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_BLOCK, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"

#: original → diffusers; ``{i}`` is the number of a block
_FLUX: Mapping[str, tuple[str, ...]] = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "double_blocks.{i}.img_mod.lin": (f"{_BLOCK}.norm1.linear",),
    "double_blocks.{i}.txt_mod.lin": (f"{_BLOCK}.norm1_context.linear",),
    "double_blocks.{i}.img_attn.qkv": _projections(f"{_BLOCK}.attn", *_QKV),
    "double_blocks.{i}.txt_attn.qkv": _projections(f"{_BLOCK}.attn", *_ADDED),
    "double_blocks.{i}.img_attn.proj": (f"{_BLOCK}.attn.to_out.0",),
    "double_blocks.{i}.txt_attn.proj": (f"{_BLOCK}.attn.to_add_out",),
    "double_blocks.{i}.img_mlp.0": (f"{_BLOCK}.ff.net.0.proj",),
    "double_blocks.{i}.img_mlp.2": (f"{_BLOCK}.ff.net.2",),
    "double_blocks.{i}.txt_mlp.0": (f"{_BLOCK}.ff_context.net.0.proj",),
    "double_blocks.{i}.txt_mlp.2": (f"{_BLOCK}.ff_context.net.2",),
    "single_blocks.{i}.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "single_blocks.{i}.linear1": (*_projections(f"{_SINGLE}.attn", *_QKV), f"{_SINGLE}.proj_mlp"),
    "single_blocks.{i}.linear2": (f"{_SINGLE}.proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_X, _CONTEXT = "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block"
_SD3: Mapping[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    f"{_X}.adaLN_modulation.1": (f"{_BLOCK}.norm1.linear",),
    f"{_CONTEXT}.adaLN_modulation.1": (f"{_BLOCK}.norm1_context.linear",),
    f"{_X}.attn.qkv": _projections(f"{_BLOCK}.attn", *_QKV),
    f"{_CONTEXT}.attn.qkv": _projections(f"{_BLOCK}.attn", *_ADDED),
    f"{_X}.attn2.qkv": _projections(f"{_BLOCK}.attn2", *_QKV),
    f"{_X}.attn.proj": (f"{_BLOCK}.attn.to_out.0",),
    f"{_CONTEXT}.attn.proj": (f"{_BLOCK}.attn.to_add_out",),
    f"{_X}.attn2.proj": (f"{_BLOCK}.attn2.to_out.0",),
    f"{_X}.attn.ln_q": (f"{_BLOCK}.attn.norm_q",),
    f"{_X}.attn.ln_k": (f"{_BLOCK}.attn.norm_k",),
    f"{_CONTEXT}.attn.ln_q": (f"{_BLOCK}.attn.norm_added_q",),
    f"{_CONTEXT}.attn.ln_k": (f"{_BLOCK}.attn.norm_added_k",),
    f"{_X}.attn2.ln_q": (f"{_BLOCK}.attn2.norm_q",),
    f"{_X}.attn2.ln_k": (f"{_BLOCK}.attn2.norm_k",),
    f"{_X}.mlp.fc1": (f"{_BLOCK}.ff.net.0.proj",),
    f"{_X}.mlp.fc2": (f"{_BLOCK}.ff.net.2",),
    f"{_CONTEXT}.mlp.fc1": (f"{_BLOCK}.ff_context.net.0.proj",),
    f"{_CONTEXT}.mlp.fc2": (f"{_BLOCK}.ff_context.net.2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_OPEN, _CLIP = "transformer.resblocks.{i}", "text_model.encoder.layers.{i}"
#: OpenCLIP's text encoders → transformers' CLIP; `text_projection`, which OpenCLIP holds transposed, is no module there
_OPEN_CLIP: Mapping[str, tuple[str, ...]] = {
    f"{_OPEN}.attn.in_proj": _projections(f"{_CLIP}.self_attn", "q_proj", "k_proj", "v_proj"),
    f"{_OPEN}.attn.out_proj": (f"{_CLIP}.self_attn.out_proj",),
    f"{_OPEN}.mlp.c_fc": (f"{_CLIP}.mlp.fc1",),
    f"{_OPEN}.mlp.c_proj": (f"{_CLIP}.mlp.fc2",),
    f"{_OPEN}.ln_1": (f"{_CLIP}.layer_norm1",),
    f"{_OPEN}.ln_2": (f"{_CLIP}.layer_norm2",),
    "token_embedding": ("text_model.embeddings.token_embedding",),
    "ln_final": ("text_model.final_layer_norm",),
}
#: the halves (shift, scale) of this module are (scale, shift) in diffusers
_SWAPPED = "final_layer.adaLN_modulation.1"


def pairs_of(modules: Iterable[str]) -> tuple[Pair, ...]:
    """The modules of a model in both layouts, for a model whose own ``modules`` are of either layout. A module of the original
    layout that diffusers splits counts if the model has all of the parts.
    """
    there = dict.fromkeys(modules)
    tables = [_FLUX] * ("pos_embed.proj" not in there) + [_SD3] * (
        not any(name.startswith("single_transformer_blocks.") for name in there)
    )
    tables += [_OPEN_CLIP] * any(name.startswith(("transformer.resblocks.", "text_model.")) for name in there)
    found = [pair for table in tables for pair in _from_table(table, there)]
    return tuple(dict.fromkeys([*found, *_of_unet(there)]))


# --- tables -----------------------------------------------------------------------------------------------------------


def _from_table(table: Mapping[str, Sequence[str]], there: Collection[str]) -> Iterator[Pair]:
    """The pairs of one family: by the names of the original layout, or by those of diffusers."""
    blocks = sorted(
        {int(number) for name in there for number in re.findall(r"(?:blocks|layers)\.(\d{1,4})(?=\.)", name)}
    )
    for original, parts in table.items():
        for number in blocks if "{i}" in original else [0]:
            name, own = original.format(i=number), tuple(part.format(i=number) for part in parts)
            if name in there or all(part in there for part in own):
                yield Pair(name, own, name == _SWAPPED or _is_last_context(name, there))


def _is_last_context(name: str, there: Collection[str]) -> bool:
    """Whether the module is the modulation of SD3's last context block, whose output is not used: it has a shift and a scale alone,
    in diffusers' other order.
    """
    match = re.fullmatch(r"joint_blocks\.(\d+)\.context_block\.adaLN_modulation\.1", name)
    if match is None:
        return False
    number = int(match[1])
    return not any(
        n.startswith((f"joint_blocks.{number + 1}.", f"transformer_blocks.{number + 1}.")) for n in there
    ) and not (
        f"joint_blocks.{number}.context_block.attn.proj" in there
        or f"transformer_blocks.{number}.attn.to_add_out" in there
    )


# --- U-Nets -----------------------------------------------------------------------------------------------------------

#: (original, diffusers) of the modules outside of the blocks
_AROUND = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
#: (original, diffusers) of the modules in a residual block
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def _of_unet(there: Collection[str]) -> Iterator[Pair]:
    known = frozenset(there)
    layers = _layers_per_block(known)
    for rule in (_to_diffusers, _to_original):
        for name in there:
            other = rule(name, layers, known)
            if other is not None:
                yield Pair(*((name, (other,)) if rule is _to_diffusers else (other, (name,))))


def _layers_per_block(there: Collection[str]) -> int:
    """``layers_per_block`` of a U-Net, by the names of either layout; 2, as in Stable Diffusion, where these do not tell."""
    down = [
        int(n) for name in there for n in re.findall(r"^down_blocks\.\d+\.(?:resnets|attentions)\.(\d{1,3})\.", name)
    ]
    up = [int(n) for name in there for n in re.findall(r"^up_blocks\.\d+\.(?:resnets|attentions)\.(\d{1,3})\.", name)]
    steps = [int(n) for name in there for n in re.findall(r"^input_blocks\.(\d{1,3})\.0\.op$", name)]
    if steps:
        return max(1, min(steps) - 1)
    return max([*(n + 1 for n in down), *up], default=0) or 2


def _renamed(table: Iterable[tuple[str, str]], name: str) -> str | None:
    return next((new for old, new in table if name == old), None)


def _turned(table: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(b, a) for a, b in table]


def _to_diffusers(name: str, layers: int, there: frozenset[str]) -> str | None:  # noqa: ARG001 - the signature of a rule
    """The name in diffusers of a module of the original layout; None for another name."""
    around = _renamed(_AROUND, name)
    if around is not None:
        return around
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d{1,3})\.(.+)", name)
    if match is None:
        return None
    where, number, rest = match[1], int(match[2]), match[3]
    if where == "middle_block":
        inner = _MIDDLE.get(match[2])
        return None if inner is None else _inside(f"mid_block.{inner}", rest, _RESNET)
    slot, _, rest = rest.partition(".")
    block, layer = divmod(number - 1 if where == "input_blocks" else number, layers + 1)
    if where == "input_blocks" and (slot, rest) == ("0", "op"):
        return f"down_blocks.{block}.downsamplers.0.conv"
    if where == "output_blocks" and rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    side = "down_blocks" if where == "input_blocks" else "up_blocks"
    kind = {"0": "resnets", "1": "attentions"}.get(slot)
    return None if kind is None or number < 0 else _inside(f"{side}.{block}.{kind}.{layer}", rest, _RESNET)


def _to_original(name: str, layers: int, there: frozenset[str]) -> str | None:
    """The name in the original layout of a module of diffusers; None for another name."""
    around = _renamed(_turned(_AROUND), name)
    if around is not None:
        return around
    match = re.fullmatch(r"mid_block\.(resnets\.0|attentions\.0|resnets\.1)\.(.+)", name)
    if match is not None:
        number = next(n for n, inner in _MIDDLE.items() if inner == match[1])
        return _inside(f"middle_block.{number}", match[2], _turned(_RESNET))
    match = re.fullmatch(r"(down|up)_blocks\.(\d{1,3})\.(\w+)\.(\d{1,3})\.(.+)", name)
    if match is None:
        return None
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if (side, kind, rest) == ("down", "downsamplers", "conv"):
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
    if (side, kind, rest) == ("up", "upsamplers", "conv"):
        attention = any(n.startswith(f"up_blocks.{block}.attentions.") for n in there)
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if attention else 1}.conv"
    slot = {"resnets": 0, "attentions": 1}.get(kind)
    if slot is None:
        return None
    before = (
        f"input_blocks.{(layers + 1) * block + layer + 1}"
        if side == "down"
        else (f"output_blocks.{(layers + 1) * block + layer}")
    )
    return _inside(f"{before}.{slot}", rest, _turned(_RESNET))


def _inside(path: str, rest: str, resnet: Iterable[tuple[str, str]]) -> str:
    """The path of a module in a block: the leaves of attentions have the same names in both layouts."""
    return f"{path}.{_renamed(resnet, rest) or rest}"
