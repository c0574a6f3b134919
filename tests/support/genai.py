"""onnxruntime-genai as released: greedy tokens of a folder, by a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from released import installed, newest

SUPPORT = Path(__file__).parent
PACKAGE, VERSION = "onnxruntime-genai", "0.18.0"


def run_with_it(command: list[str], version: str = VERSION, given: str = "") -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and with the package; `given` on stdin."""
    packages = installed(PACKAGE, version or newest(PACKAGE))
    environment = os.environ | {"PYTHONPATH": str(packages), "ORT_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, *command], input=given, env=environment, capture_output=True, text=True, check=False
    )


def greedy(folder: Path, prompts: list[list[int]], steps: int, version: str = VERSION) -> dict[str, Any]:
    """`version` of the package, or "words" where it stops, and "tokens": at most `steps` after each prompt."""
    command = [str(SUPPORT / "genai_process.py"), str(folder), str(steps)]
    done = run_with_it(command, version, json.dumps(prompts))
    if done.returncode:
        return {"version": version, "words": done.stderr.strip().splitlines()[-1:]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def encoded(folder: Path, texts: list[str], version: str = VERSION) -> list[list[int]]:
    """Token ids of texts, by the tokenizer that it makes of the folder's files."""
    answer = greedy(folder, texts, 0, version)  # type: ignore[arg-type]  # texts are encoded, and nothing is generated
    ids: list[list[int]] = answer["prompts"]
    return ids
