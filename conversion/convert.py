"""Convert a Wan checkpoint, or one model's file, to another layout or dtype.

python conversion/convert.py Wan2.2-T2V-A14B Wan2.2-T2V-A14B-Diffusers --to diffusers
python conversion/convert.py high.gguf high.safetensors --to single-file --dtype bf16
"""

import argparse
import sys
from collections.abc import Sequence

from wan22.checkpoints.converting.convert import SHARD_SIZE, convert, plan
from wan22.checkpoints.converting.plan import LAYOUTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those it was called with.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder or hub repository in any layout, or a weight file")
    parser.add_argument("destination", help="folder, or .safetensors file, that is not there yet")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    parser.add_argument("--dtype", help="of all tensors: bf16, fp16 or fp32 (default: as stored)")
    parser.add_argument("--shard-size", default=SHARD_SIZE, help="largest file (default: %(default)s)")
    parser.add_argument("--attention-head-dim", type=int, help="if it is not 128 and no config.json tells it")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    parser.add_argument("--verify", action="store_true", help="read the result and compare every tensor")
    options = vars(parser.parse_args(arguments))
    dry_run, verify = options.pop("dry_run"), options.pop("verify")
    try:
        if dry_run:
            print(*plan(**options).describe(), sep="\n")
        else:
            print(convert(**options, verify=verify, progress=True))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
