"""The transformer of diffusion_policy under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

OUTSIDE = {
    "input_emb.": "enter.",
    "cond_obs_emb.": "enter_observation.",
    "ln_f.": "norm.",
    "head.": "leave.",
    # The MLP that takes the place of encoder layers.
    "encoder.0.": "encoder.0.",
    "encoder.2.": "encoder.2.",
}
# Parts of a layer of torch's decoder, and ours.
IN_DECODER = {
    "norm1.": "actions.norm.",
    "self_attn.in_proj_": "actions.project.",
    "self_attn.out_proj.": "actions.join.",
    "norm2.": "memory.norm.",
    "multihead_attn.out_proj.": "memory.join.",
    "norm3.": "feed_forward.norm.",
    "linear1.": "feed_forward.expand.",
    "linear2.": "feed_forward.contract.",
}
# Parts of a layer of torch's encoder; ours is two blocks one after the other.
IN_ENCODER = {
    "norm1.": (0, "norm."),
    "self_attn.in_proj_": (0, "project."),
    "self_attn.out_proj.": (0, "join."),
    "norm2.": (1, "norm."),
    "linear1.": (1, "expand."),
    "linear2.": (1, "contract."),
}
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.((?:\w+\.)?(?:in_proj_|\w+\.))(weight|bias)")


def transformer_weights(theirs: Mapping[str, Tensor], *, obs_tokens: int) -> dict[str, Tensor]:
    """Rename the transformer's weights; buffers and what we do not have are left out.

    Args:
        theirs: the weights, without a prefix.
        obs_tokens: number of observations.

    Returns:
        The weights of `policy.model.denoisers.encoder_decoder.EncoderDecoder`.
    """
    ours: dict[str, Tensor] = {}
    for key, value in theirs.items():
        if key == "pos_emb":
            ours["positions"] = value[0]
        elif key == "cond_pos_emb":
            # There may be more positions than observations.
            ours["memory_positions"] = value[0, : 1 + obs_tokens]
        elif match := LAYER.fullmatch(key):
            part, number, name, kind = match.groups()
            renamed = _in_decoder if part == "decoder" else _in_encoder
            ours |= renamed(int(number), name, kind, value)
        else:
            start = next((start for start in OUTSIDE if key.startswith(start)), None)
            if start is not None:
                ours[key.replace(start, OUTSIDE[start], 1)] = value
    return ours


def count_layers(theirs: Mapping[str, Tensor], part: str) -> int:
    """The number of layers of `encoder` or `decoder`."""
    return len({match[2] for key in theirs if (match := LAYER.fullmatch(key)) and match[1] == part})


def _in_decoder(number: int, name: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    prefix = f"layers.{number}."
    if name == "multihead_attn.in_proj_":
        # Query, key and value of the attention to the memory are one matrix there.
        width = len(value) // 3
        return {f"{prefix}memory.ask.{kind}": value[:width], f"{prefix}memory.project.{kind}": value[width:]}
    return {f"{prefix}{IN_DECODER[name]}{kind}": value} if name in IN_DECODER else {}


def _in_encoder(number: int, name: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    if name not in IN_ENCODER:
        return {}
    block, renamed = IN_ENCODER[name]
    return {f"encoder.{2 * number + block}.{renamed}{kind}": value}
