"""Adds the forwards of a released model file to `fxquant/frontend/recognition/versions.json`, as digests.

    python tests/frontend/record_versions.py FAMILY SOURCE FILE CLASS…
    python tests/frontend/record_versions.py transformers SOURCE transformers CLASS…    of the installed transformers

SOURCE says where the file is published, as "transformers 5.13 to 5.23": read all of them. A class whose forward does
something else than the adapter of its family says must not be recorded. `CLASS:nonnegative_bias` does that where no
correction bias is negative.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fxquant.frontend.recognition.published import ONE_OF, read
from fxquant.frontend.user_file import module_of, open_user_file

VERSIONS = Path(__file__).parents[2] / "fxquant/frontend/recognition/versions.json"


def record(family: str, source: str, module: ModuleType, names: list[str]) -> None:
    """Add each class; a digest that is there already gets one more source."""
    document = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else {}
    entries: list[dict[str, Any]] = document.setdefault(family, [])
    for given in names:
        name, _, condition = given.partition(":")
        code = read(getattr(module, name))
        assert code is not None, name
        unknown = {key: value for key, value in code.constants.items() if value not in ONE_OF.get(key, ())}
        assert not unknown, f"{name} reads {unknown}"
        statements = [statement.digest for statement in code.statements]
        new = {"class": name, "sources": [], "digest": code.digest, "statements": statements}
        new |= {condition: True} if condition else {}
        entry = next((each for each in entries if (each["class"], each["digest"]) == (name, code.digest)), new)
        if entry is new:
            entries.append(new)
        if source not in entry["sources"]:
            entry["sources"].append(source)
        print(name, code.digest[:12], len(statements), "new" if entry is new else "known")
    entries.sort(key=lambda each: (each["class"], each["sources"]))
    VERSIONS.write_text(_text(document))


def _text(document: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with a line for each entry."""
    families = []
    for family, entries in sorted(document.items()):
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        families.append(f"  {json.dumps(family)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(families) + "\n}\n"


def main(family: str, source: str, file: str, *names: str) -> None:
    """See the head of this file."""
    if file == "transformers":
        module = import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
        record(family, source, module, list(names))
        return
    with open_user_file(Path(file)) as opened:
        record(family, source, module_of(opened), list(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
