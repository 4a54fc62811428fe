"""All benchmarks: wan22 beside diffusers in one process, by turns.

    python -m tests.bench [--only NAME …] [--rounds N] [--quick] [--json FILE]

Each part also runs by itself, `python -m tests.bench.transformer` say.
"""

from importlib import import_module

import torch

from tests.bench.harness import arguments, report, settings_of

ON_CPU = ("autoencoder", "transformer", "pipelines", "loading")
ON_GPU = ("gpu", "budgets")


def main() -> None:
    """Run the chosen parts; those for GPUs are left out where there is none."""
    parser = arguments(__doc__)
    names = ON_CPU + ON_GPU
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    parts = options.only or (names if torch.cuda.is_available() else ON_CPU)
    rows = []
    for name in parts:
        rows += import_module(f"tests.bench.{name}").run(settings_of(options))
    report(rows, options.json)


if __name__ == "__main__":
    main()
