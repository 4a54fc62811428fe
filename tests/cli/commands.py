"""Run commands of the command line in this process."""

import re

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from wan22.cli.app import app

QUICK = ["--steps", "2", "--frames", "5"]


def run(*arguments, code=0, answer=None):
    """Run a command; return what it wrote to stdout, and to stderr as one line without frames.

    `answer` is what a person types.
    """
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def picture(path, size=(64, 64)):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size).save(path)
    return path
