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


def greedy(folder: Path, prompts: list[list[int]], steps: int, version: str = VERSION) -> dict[str, Any]:
    """`version` of the package, or "words" where it stops, and "tokens": at most `steps` after each prompt."""
    packages = installed(PACKAGE, version or newest(PACKAGE))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages)]), "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(SUPPORT / "genai_process.py"), str(folder), str(steps)]
    asked = json.dumps(prompts)
    done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"version": version, "words": done.stderr.strip().splitlines()[-1:]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def encoded(folder: Path, texts: list[str], version: str = VERSION) -> list[list[int]]:
    """Token ids of texts, by the tokenizer that it makes of the folder's files."""
    answer = greedy(folder, texts, 0, version)  # type: ignore[arg-type]  # texts are encoded, and nothing is generated
    ids: list[list[int]] = answer["prompts"]
    return ids
