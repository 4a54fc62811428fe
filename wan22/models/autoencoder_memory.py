"""Slicing, tiling and strips of the autoencoder: less memory for more work."""

from ..checks import check_positive_int, check_size
from .tiling import Tile, make_tiles, split_axis

# Numbers of strips from which planning chooses: with more, what is computed as a whole takes the memory.
STRIPS = (2, 4, 8, 16)


class MemoryModes:
    """The memory switches of AutoencoderKLWan."""

    spatial_stride: int

    use_slicing = False
    use_tiling = False
    use_strips = False
    num_strips = 4
    tile_sample_min_height = tile_sample_min_width = 256
    tile_sample_stride_height = tile_sample_stride_width = 192

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Compute large videos in overlapping tiles, which takes less memory and changes the result a little.

        Sizes of a tile and strides from tile to tile are pixels, positive multiples of `spatial_stride`; a
        stride is at most its tile. None keeps the present value, initially 256 and 192.

        Raises: ValueError: a value is not as above, or strips are enabled.
        """
        if self.use_strips:
            raise ValueError(
                "strips are enabled, which are exact; call disable_strips() before enable_tiling()"
            )
        given = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
            "tile_sample_stride_height": tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width,
        }
        sizes = {
            name: check_size(name, getattr(self, name) if size is None else size, self.spatial_stride)
            for name, size in given.items()
        }
        for axis in ("height", "width"):
            size, stride = sizes[f"tile_sample_min_{axis}"], sizes[f"tile_sample_stride_{axis}"]
            if stride > size:
                raise ValueError(
                    f"tile_sample_stride_{axis} is {stride}; it must be at most the tile's {size}"
                )
        for name, size in sizes.items():
            setattr(self, name, size)
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Compute each video as a whole again."""
        self.use_tiling = False

    def enable_strips(self, strips: int = 4) -> None:
        """Compute the highest resolutions in horizontal strips, which takes less memory and keeps the result.

        Each row is computed once, so strips cost little time. What memory is left to save is the layers'
        history of earlier frames: `encode_stream` and `decode_stream` keep it where their `caches` say, and
        pipelines say on the host, if a GPU computes. Frames with few rows have fewer strips.

        Raises: ValueError: strips is below 1, or tiling is enabled.
        """
        strips = check_positive_int("strips", strips)
        if self.use_tiling:
            raise ValueError("tiling is enabled, which strips replace; call disable_tiling() first")
        self.use_strips, self.num_strips = True, strips

    def disable_strips(self) -> None:
        """Compute each resolution as a whole again."""
        self.use_strips = False

    def enable_slicing(self) -> None:
        """Compute one sample of a batch at a time, which takes less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Compute all samples of a batch at once again."""
        self.use_slicing = False

    def _tiles(self, b: int, h: int, w: int, tiled: bool | None = None) -> list[Tile]:
        """Return the tiles of b samples of h x w latent cells."""
        samples, rows, columns = [(0, b)], [(0, h)], [(0, w)]
        if self.use_slicing:
            samples = split_axis(b, 1, 1)
        if self.use_tiling if tiled is None else tiled:
            s = self.spatial_stride
            rows = split_axis(h, self.tile_sample_min_height // s, self.tile_sample_stride_height // s)
            columns = split_axis(w, self.tile_sample_min_width // s, self.tile_sample_stride_width // s)
        return make_tiles(samples, rows, columns)

    def _strips(self) -> int:
        return self.num_strips if self.use_strips else 1
