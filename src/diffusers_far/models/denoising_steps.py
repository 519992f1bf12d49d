"""What depends on a frame's timesteps and conditions alone, computed once for all of its denoising steps.

B batch, S denoising steps.
"""

from collections.abc import Callable

import torch
import torch.nn as nn

from .frames import FrameBatch


# Of a product. Beyond, a step has enough rows of its own to make the reading of weights worth it, and what is kept would
# be large: 12 layers of width 768 keep 56 MB of 256 rows in float32.
MAX_ROWS = 256


class DenoisingSteps:
    """The denoising steps of one noisy frame: all timesteps are known before the first, and conditions stay as they are.

    A modulation multiplies its weights with one row a step, which takes as long as reading the weights. Here each does so
    for all steps at the first one, and what comes out is kept until the frame is done.

    Args:
        timesteps (`torch.Tensor` of shape `(S,)`): As the scheduler has them.

    Attributes:
        index (`int`): The step that is being taken.
    """

    def __init__(self, timesteps: torch.Tensor):
        self.timesteps = timesteps
        self.index = 0
        self._embeddings: torch.Tensor | None = None
        self._products: dict[nn.Module, torch.Tensor] = {}

    @property
    def timestep(self) -> torch.Tensor:
        return self.timesteps[self.index]

    def is_worth_it(self, batch_size: int) -> bool:
        """Whether the products of all steps are small enough to be kept."""
        return len(self.timesteps) * batch_size <= MAX_ROWS

    def embedding(self, embed: Callable[[FrameBatch, torch.Tensor], torch.Tensor], frame: FrameBatch) -> torch.Tensor:
        """The embedding of the frame at this step, `(B, 1, dim)`.

        Args:
            embed (`Callable`): From frames and timesteps `(B, F)` to embeddings `(B, F, dim)`.
            frame (`FrameBatch`): The noisy frame; only its conditions count.
        """
        if self._embeddings is None:
            batch_size, num_steps = frame.latents.shape[0], len(self.timesteps)
            self._embeddings = embed(frame.repeated(num_steps), self.timesteps.float().expand(batch_size, num_steps))
        return self._at_this_step(self._embeddings)

    def product(self, module: nn.Module, project: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`project` of the frame's embedding at this step, `(B, 1, dim)`, which a module calls its own."""
        if module not in self._products:
            self._products[module] = project(self._embeddings)
        return self._at_this_step(self._products[module])

    def _at_this_step(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.index : self.index + 1]
