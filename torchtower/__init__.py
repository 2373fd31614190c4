"""Train one ``nn.Module`` on every device of a machine from one process, and hold every tower's gradient."""

from torchtower._extension import build_info

__all__ = ["build_info"]
