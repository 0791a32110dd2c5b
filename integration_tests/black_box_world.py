"""The command line in this process, and files of vectors with their ids."""

from __future__ import annotations

import json

import numpy as np
from click.testing import CliRunner

from bowerbird.cli import main


def bowerbird(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (arguments, result.output, result.exception)
    return result


def bowerbird_json(*arguments):
    return json.loads(bowerbird(*arguments, "--json").stdout.splitlines()[-1])


def parquet(path, ids, vectors, labels):
    import pyarrow
    import pyarrow.parquet

    columns = {"id": ids, "vector": vectors.tolist(), "label": labels}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def npy(path, ids, vectors):
    np.save(path, vectors)
    path.with_suffix(".ids.txt").write_text("\n".join(ids) + "\n")


def safetensors(path, ids, vectors):
    from safetensors.numpy import save_file

    save_file({"vectors": np.ascontiguousarray(vectors)}, path, {"ids": json.dumps(ids)})
