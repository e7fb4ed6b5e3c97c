"""The kernels behind joint_qk_norm.py: a program works on rows of the text or on rows of the image, each as qk_norm_kernels.py has them.

The branch is the whole program's, so that each side knows its own tensors: nothing is chosen element by element, and the text's side has
no angles.
"""

from fasttrain_kernels.language import jit, tl
from fasttrain_kernels.qk_norm_kernels import backward_rows, forward_tile


@jit
def joint_qk_norm_forward_kernel(
    qkv_text,  # [B, M, 3, HEADS, WIDTH] any float, of any strides of samples and tokens
    qkv_image,  # [B, N, 3, HEADS, WIDTH] qkv_text's type, of any strides of samples and tokens
    q_weight_text,  # [WIDTH] any float
    k_weight_text,  # [WIDTH] any float
    q_weight_image,  # [WIDTH] any float
    k_weight_image,  # [WIDTH] any float
    cos,  # [N, WIDTH / 2] any float, or None
    sin,  # [N, WIDTH / 2] any float, or None
    q,  # [B, M + N, HEADS, WIDTH] qkv_text's type
    k,  # [B, M + N, HEADS, WIDTH] qkv_text's type
    v,  # [B, M + N, HEADS, WIDTH] qkv_text's type
    batch,
    text_tokens,
    image_tokens,
    text_sample_stride,
    text_token_stride,
    image_sample_stride,
    image_token_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text_rows = batch * text_tokens * HEADS
    text_programs = tl.cdiv(text_rows, GROUPS * ROWS)
    program = tl.program_id(0)
    if program < text_programs:
        forward_tile(
            qkv_text,
            q_weight_text,
            k_weight_text,
            None,
            None,
            q,
            k,
            v,
            program * (GROUPS * ROWS),
            text_rows,
            text_tokens,
            0,
            text_tokens + image_tokens,
            text_sample_stride,
            text_token_stride,
            eps,
            HEADS,
            WIDTH,
            GROUPS,
            ROWS,
            BLOCK,
        )
    else:
        forward_tile(
            qkv_image,
            q_weight_image,
            k_weight_image,
            cos,
            sin,
            q,
            k,
            v,
            (program - text_programs) * (GROUPS * ROWS),
            batch * image_tokens * HEADS,
            image_tokens,
            text_tokens,
            text_tokens + image_tokens,
            image_sample_stride,
            image_token_stride,
            eps,
            HEADS,
            WIDTH,
            GROUPS,
            ROWS,
            BLOCK,
        )


@jit
def joint_qk_norm_backward_kernel(
    dq,  # [B, M + N, HEADS, WIDTH] qkv_text's type, of any strides, which dk and dv share
    dk,  # [B, M + N, HEADS, WIDTH] qkv_text's type
    dv,  # [B, M + N, HEADS, WIDTH] qkv_text's type, or None
    qkv_text,  # [B, M, 3, HEADS, WIDTH] any float, of any strides of samples and tokens
    qkv_image,  # [B, N, 3, HEADS, WIDTH] qkv_text's type, of any strides of samples and tokens
    q_weight_text,  # [WIDTH] any float
    k_weight_text,  # [WIDTH] any float
    q_weight_image,  # [WIDTH] any float
    k_weight_image,  # [WIDTH] any float
    cos,  # [N, WIDTH / 2] any float, or None
    sin,  # [N, WIDTH / 2] any float, or None
    dqkv_text,  # [B, M, 3, HEADS, WIDTH] qkv_text's type
    dqkv_image,  # [B, N, 3, HEADS, WIDTH] qkv_text's type
    sums,  # [programs, 2, 2, WIDTH] fp32: of text and of image dq_weight and dk_weight over this program's rows
    batch,
    text_tokens,
    image_tokens,
    share,
    text_sample_stride,
    text_token_stride,
    image_sample_stride,
    image_token_stride,
    grad_sample_stride,
    grad_token_stride,
    grad_head_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text_rows = batch * text_tokens * HEADS
    image_rows = batch * image_tokens * HEADS
    text_programs = tl.cdiv(text_rows, share)
    program = tl.program_id(0)
    mine = sums + program * (4 * WIDTH)
    column = tl.arange(0, 2 * BLOCK)
    none = tl.zeros([2 * BLOCK], tl.float32)
    if program < text_programs:
        start = program * share
        backward_rows(
            dq,
            dk,
            dv,
            qkv_text,
            q_weight_text,
            k_weight_text,
            None,
            None,
            dqkv_text,
            mine,
            start,
            tl.minimum(start + share, text_rows),
            text_tokens,
            0,
            text_sample_stride,
            text_token_stride,
            grad_sample_stride,
            grad_token_stride,
            grad_head_stride,
            eps,
            HEADS,
            WIDTH,
            GROUPS,
            ROWS,
            BLOCK,
        )
        tl.store(mine + 2 * WIDTH + column, none, mask=column < 2 * WIDTH)
    else:
        start = (program - text_programs) * share
        backward_rows(
            dq,
            dk,
            dv,
            qkv_image,
            q_weight_image,
            k_weight_image,
            cos,
            sin,
            dqkv_image,
            mine + 2 * WIDTH,
            start,
            tl.minimum(start + share, image_rows),
            image_tokens,
            text_tokens,
            image_sample_stride,
            image_token_stride,
            grad_sample_stride,
            grad_token_stride,
            grad_head_stride,
            eps,
            HEADS,
            WIDTH,
            GROUPS,
            ROWS,
            BLOCK,
        )
        tl.store(mine + column, none, mask=column < 2 * WIDTH)
