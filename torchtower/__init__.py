"""Train one ``nn.Module`` on every device of a machine from one process, and hold every tower's gradient."""

from torchtower._extension import build_info
from torchtower.averaging import average_gradients, stack_gradients
from torchtower.batch_norm import convert_sync_batchnorm, tower_sum
from torchtower.parallel import TowerParallel
from torchtower.threads.rounds import current_tower

__version__ = str(build_info()["version"])
__all__ = [
    "TowerParallel",
    "average_gradients",
    "build_info",
    "convert_sync_batchnorm",
    "current_tower",
    "stack_gradients",
    "tower_sum",
]
