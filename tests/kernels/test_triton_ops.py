"""The seam: what a runner asks of ``TritonOps`` reaches the kernels, and is counted."""

import torch

from pdserve.model.kernels.attention import paged_attention_reference
from pdserve.model.kernels.rope import rope_and_cache_reference
from pdserve.model.ops import BatchLayout, LinearWeight, Ops
from pdserve.model.triton_ops import TritonOps
from tests.kernels.support import DEVICE, assert_near, randn

H, G, D, T, LAYER = 4, 2, 16, 4, 1


def layout() -> BatchLayout:
    """A prompt of 6 tokens in blocks 2 and 0, and the 4th token of a sequence in block 3."""

    def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return BatchLayout(
        positions_N=integers(0, 1, 2, 3, 4, 5, 3, dtype=torch.int64),
        slots_N=integers(8, 9, 10, 11, 0, 1, 15, dtype=torch.int64),
        starts_R1=integers(0, 6, 7),
        tables_RB=integers(2, 0, 3, 0).view(2, 2),
        contexts_R=integers(6, 4),
        longest_run=6,
        longest_context=6,
    )


def test_a_layers_attention_goes_through_the_kernels_and_into_its_layer_of_the_pool() -> None:
    ops: Ops = TritonOps()
    batch = layout()
    pool_PL2GTD = randn(5, 3, 2, G, T, D, dtype=torch.float32, seed=1)
    expected_PL2GTD = pool_PL2GTD.clone()
    qkv_NXD = randn(7, H + 2 * G, D, dtype=torch.float32)
    q_NHD, k_NGD, v_NGD = qkv_NXD[:, :H], qkv_NXD[:, H : H + G], qkv_NXD[:, H + G :]
    rope_MD = randn(9, D, dtype=torch.float32, seed=2)

    turned_NHD = ops.rope_and_cache(q_NHD, k_NGD, v_NGD, rope_MD, batch, pool_PL2GTD, LAYER)
    out_NHD = ops.attention(turned_NHD, batch, pool_PL2GTD, LAYER, 0.25)

    layer_P2GTD = expected_PL2GTD[:, LAYER]
    expected_NHD = rope_and_cache_reference(
        q_NHD, k_NGD, v_NGD, rope_MD, batch.positions_N, batch.slots_N, layer_P2GTD
    )
    assert_near(turned_NHD, expected_NHD)
    assert_near(pool_PL2GTD, expected_PL2GTD)
    expected_NHD = paged_attention_reference(
        turned_NHD, batch.starts_R1, batch.tables_RB, batch.contexts_R, layer_P2GTD, 0.25
    )
    assert_near(out_NHD, expected_NHD)


def test_every_call_is_counted() -> None:
    ops = TritonOps()
    x_NC, weight_C = randn(2, 8, dtype=torch.float32), randn(8, dtype=torch.float32)
    assert ops.calls() == {}
    ops.rms_norm(x_NC, weight_C, 1e-5)
    ops.rms_norm(x_NC, weight_C, 1e-5)
    ops.add_rms_norm(x_NC, x_NC, weight_C, 1e-5)
    ops.silu_mul(x_NC)
    ops.linear(x_NC, ops.pack(LinearWeight(randn(3, 8, dtype=torch.float32))))
    assert ops.calls() == {"rms_norm": 2, "add_rms_norm": 1, "silu_mul": 1, "linear": 1}


def test_a_linear_layer_gives_a_row_the_same_bits_alone_and_in_company() -> None:
    ops = TritonOps()
    for dtype in (torch.float32, torch.bfloat16):
        x_NC = randn(9, 64, dtype=dtype)
        weight = LinearWeight(randn(48, 64, dtype=dtype, seed=1), randn(48, dtype=dtype, seed=2))
        together_NO = ops.linear(x_NC, weight)
        for n in (0, 4, 8):
            alone_NO = ops.linear(x_NC[n : n + 1], weight)
            assert alone_NO.shape == (1, 48)
            assert torch.equal(alone_NO[0], together_NO[n]), f"row {n} in {dtype}"
