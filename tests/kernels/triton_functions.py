"""Scores and masks of functions that a user might write, in Python and in Triton."""

import triton
import triton.language as tl

from ring_attn.mask import MaskMod
from ring_attn.score_mod import ScoreMod


@triton.jit
def bow(score, b, h, q_pos, kv_pos):
    return score + 0.1 * score * score + 0.3 * (h + 2 * b) * ((q_pos + 3 * kv_pos) % 7 == 0)


@triton.jit
def through_bow(dscore, score, b, h, q_pos, kv_pos):
    return dscore * (1 + 0.2 * score)


@triton.jit
def shrink(score, b, h, q_pos, kv_pos):
    return score / (1.0 + h)


@triton.jit
def through_shrink(dscore, score, b, h, q_pos, kv_pos):
    return dscore / (1.0 + h)


@triton.jit
def sees(b, h, q_pos, kv_pos):
    return (q_pos + 2 * kv_pos + h + b) % 3 != 0


@triton.jit
def sees_near(b, h, q_pos, kv_pos):
    return tl.abs(q_pos - kv_pos) < 40


@triton.jit
def sees_blocks(b, h, q_pos, kv_pos):
    return (q_pos // 32 + kv_pos // 32) % 2 == 0


@triton.jit
def sees_prefix(b, h, q_pos, kv_pos):
    return (kv_pos < 20) | (kv_pos <= q_pos)


@triton.jit
def sees_by_head(b, h, q_pos, kv_pos):
    return kv_pos < 20 + 15 * h + 5 * b


BOW = ScoreMod(lambda s, b, h, q, k: s + 0.1 * s * s + 0.3 * (h + 2 * b) * ((q + 3 * k) % 7 == 0), triton=(bow, through_bow))
SHRINK = ScoreMod(lambda s, b, h, q, k: s / (1.0 + h), triton=(shrink, through_shrink))
SEES = MaskMod(lambda b, h, q, k: (q + 2 * k + h + b) % 3 != 0, triton=sees)
SEES_NEAR = MaskMod(lambda b, h, q, k: (q - k).abs() < 40, triton=sees_near)
SEES_BLOCKS = MaskMod(lambda b, h, q, k: (q // 32 + k // 32) % 2 == 0, triton=sees_blocks)
SEES_PREFIX = MaskMod(lambda b, h, q, k: (k < 20) | (k <= q), triton=sees_prefix)
SEES_BY_HEAD = MaskMod(lambda b, h, q, k: k < 20 + 15 * h + 5 * b, triton=sees_by_head)
