"""What makes a pipeline faster or smaller, switched on and off by one line each."""

from typing import Any

from ..accel.compile import Compiled


class AcceleratedPipeline:
    """Compilation of a pipeline's models."""

    transformers: list[Any]
    vae: Any
    _compiled: Compiled | None = None

    @property
    def compiled(self) -> Compiled | None:
        """What `compile` attached; `compiled.seconds` is the time that compiling took so far."""
        return self._compiled

    def compile(self, vae: bool = True, **options: Any) -> None:
        """Compile the transformers' repeated block, once for all layers and experts, and the VAE's chunks.

        Compiling happens in the next call, in the first one at another size, and when a LoRA's strength first
        changes; calls with another prompt and the other expert use what there is.

        Args:
            vae: whether to compile the VAE, too.
            **options: of torch.compile, such as `mode` or `backend`.

        Raises:
            ValueError: something else has replaced a block's forward already.
        """
        self.uncompile()
        self._compiled = Compiled(self.transformers, self.vae if vae else None, **options)

    def uncompile(self) -> None:
        """Run as before `compile`, to the bit."""
        if self._compiled is not None:
            self._compiled.detach()
            self._compiled = None
