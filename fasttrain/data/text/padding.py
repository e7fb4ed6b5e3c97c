"""What stands behind a caption's own tokens: copies of them with noise, zeros, or nothing [Berrada et al. 2024, section 2.1, appendix B].

    replicate:  place i of M holds token i mod m of the caption's m tokens, and everywhere (their equation 7 changes all of phi)
                phi + noise sqrt(r - 1) sigma eps,   r = M / m,   eps ~ N(0, 1) by (seed, position, TEXT_PADDING)

sigma is each channel's standard deviation over the caption's own tokens. (The paper says "per-channel" in section 2.1 and "over the feature
dimension" in the appendix; only the first leaves each channel's scale its own.) r is the mean number of copies of a token, not rounded up
as a count of whole copies would be: so the noise begins at exactly 0 with a caption that fills all places, and grows without a jump.
The paper chose noise = 0.02.
"""

from typing import Literal

import torch
from fasttrain_kernels.philox import Purpose, normal
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fasttrain.cond import Text


class TextPadding(BaseModel):
    """The `data.text_padding` section.

    how: `replicate` repeats the caption with noise, `zero` leaves zeros that are attended to (what is common), `none` leaves zeros that the
    model must not see. noise: the paper's beta_txt, of `replicate`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    how: Literal["replicate", "zero", "none"] = "replicate"
    noise: float = Field(default=0.02, ge=0, le=10)


def padded(text: Text, seed: Tensor | int, position: Tensor, how: TextPadding) -> Text:
    """Captions of all M places, but for "none"; the formula is at the top of this file.

    Args:
        text: as stored: tokens [B, M, E] of any float dtype, zeros from `length` on.
        seed: [] int64 of the run.
        position: [B] int64, where the noise is drawn.
        how: the config's section.

    Returns:
        Tokens and pooled in fp32; `length` is what the model may attend to: M, or with "none" the caption's own.
    """
    tokens, pooled = text.tokens.to(torch.float32), text.pooled.to(torch.float32)
    places = tokens.shape[1]
    if how.how == "none":
        return Text(tokens, text.length, pooled)
    if how.how == "replicate":
        tokens = _replicated(tokens, text.length, seed, position, how.noise)
    return Text(tokens, torch.full_like(text.length, places), pooled)


def _replicated(tokens: Tensor, length: Tensor, seed: Tensor | int, position: Tensor, noise: float) -> Tensor:
    own = length.clamp(min=1)[:, None]  # [B, 1]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    copies = tokens[torch.arange(len(tokens), device=tokens.device)[:, None], place % own]  # [B, M, E]
    if noise == 0:
        return copies
    eps = normal(seed, position, tokens.shape[1:], Purpose.TEXT_PADDING)
    spread = torch.sqrt(tokens.shape[1] / own - 1)[..., None]  # [B, 1, 1]
    return copies + noise * spread * _deviation(tokens, place < own) * eps


def _deviation(tokens: Tensor, own: Tensor) -> Tensor:
    """Each channel's standard deviation over a caption's own tokens: [B, M, E] and [B, M] bool -> [B, 1, E]."""
    weight = own[..., None] / own.sum(1)[:, None, None]
    mean = (tokens * weight).sum(1, keepdim=True)
    return ((tokens - mean).square() * weight).sum(1, keepdim=True).sqrt()
