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
from fasttrain_kernels.text_padding import text_padding
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


def padded(text: Text, seed: Tensor | int, position: Tensor, how: TextPadding, impl: str = "auto") -> Text:
    """Captions of all M places, but for "none"; the formula is at the top of this file.

    Args:
        text: as stored: tokens [B, M, E] of any float dtype, zeros from `length` on.
        seed: [] int64 of the run.
        position: [B] int64, where the noise is drawn.
        how: the config's section.
        impl: of the operation `text_padding`.

    Returns:
        Tokens and pooled in fp32; `length` is what the model may attend to: M, or with "none" the caption's own.
    """
    pooled = text.pooled.to(torch.float32)
    if how.how == "replicate":
        tokens = text_padding(text.tokens, text.length, seed, position, noise=how.noise, impl=impl)
    else:
        tokens = text.tokens.to(torch.float32)
    length = text.length if how.how == "none" else torch.full_like(text.length, tokens.shape[1])
    return Text(tokens, length, pooled)
