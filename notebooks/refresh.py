"""Runs notebooks from a clean kernel and rewrites them: `python notebooks/refresh.py [NAME ...]`, all by default.

What is written is the same on every machine: minimal metadata, no times, no random ids. It needs `jaxact[notebooks]`.
"""

import argparse
import functools
import os
import queue
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f-]{27})?")  # nbformat's and JupyterLab's


def execute(path: Path) -> Any:
    """The notebook with the outputs of a clean kernel, on CPU, in the notebooks' folder, in normal form."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # from an older format it comes with none
        cell.setdefault("metadata", {})
    os.environ["JAX_PLATFORMS"] = "cpu"  # what is committed should not depend on who has an accelerator
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel's own words, which are no output
    )
    client.on_notebook_start = functools.partial(look_often, client)
    client.execute()
    return normalise(notebook, path.stem)


def look_often(client: Any, notebook: Any) -> None:
    """Looks for messages every second. Now and then pyzmq misses that one has come, and would wait for the timeout."""
    for channel in (client.kc.shell_channel, client.kc.iopub_channel):
        channel.get_msg = functools.partial(_next, channel.get_msg)


async def _next(get: Any, timeout: float | None = None) -> Any:
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            return await get(1)
        except queue.Empty:
            if end is not None and time.monotonic() > end:
                raise


def normalise(notebook: Any, name: str) -> Any:
    """Leaves what the author wrote and what the code said, and takes away what is of one machine or one run."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for i, cell in enumerate(notebook.cells, 1):
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if RANDOM_ID.fullmatch(cell.get("id", "0" * 8)):
            cell.id = f"{name}-{i:02}"
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            # A widget lives in a kernel only; a static picture of the same stands beside it.
            cell.outputs = [] if "interactive" in tags else joined(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
                if "metadata" in output:
                    output.metadata = nbformat.from_dict({})
                if "image/png" in output.get("data", {}):
                    output.data = nbformat.from_dict({"image/png": output.data["image/png"]})
    nbformat.validate(notebook)
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """A kernel sends what is printed in pieces, cut by the clock: here each run of them is one."""
    whole: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and whole and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_sigmoid; all without")
    names = parser.parse_args().names
    known = {path.stem: path for path in NOTEBOOKS}
    for name in (Path(n).stem for n in names or known):
        if name not in known:
            parser.error(f"there is no {name}; there are {', '.join(known)}")
        start = time.perf_counter()
        notebook = execute(known[name])
        nbformat.write(notebook, known[name])
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
