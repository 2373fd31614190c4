"""What torch settles at a first call in a process, without a lock: settled here, before towers make theirs at once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch


def settle_first_calls(devices: Iterable[torch.device]) -> None:
    """Make these calls, for towers on these devices."""
    # In a forked child the first to need torch's engine makes it anew, which two towers at once would crash in.
    torch.autograd._is_checkpoint_valid()
    for device in devices:
        if device.type == "cuda":
            _settle_order_of_attention_kernels(device)
            break


def _settle_order_of_attention_kernels(device: torch.device) -> None:
    # Which of its kernels F.scaled_dot_product_attention tries first is settled at the first call, which asks cuDNN for
    # its version meanwhile: a thread that calls then takes another kernel than ever after, of other dropout masks.
    # Source: priority_order in ATen/native/transformers/cuda/sdp_utils.cpp.
    query = torch.empty(1, 1, 1, 8, dtype=torch.float16, device=device)
    with suppress(Exception):  # else it is torch's own
        torch._fused_sdp_choice(query, query, query)
