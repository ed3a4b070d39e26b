"""Writes the demo's text into a folder, a sub-folder per domain and a file per document, as `edl label` takes it.

    python examples/pretrain/save_text.py my-text

The same folder is what `make demo DATA=my-text` takes.
"""

import argparse
import hashlib
import pathlib
import sys

import data


def save(collections, output):
    """Writes documents as OUTPUT/DOMAIN/NAME.txt, named by a hash of where they come from; returns their number."""
    count = 0
    for collection in collections:
        folder = output / collection.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in collection.documents.items():
            digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()
            (folder / f"{digest[:16]}.txt").write_bytes(content)
            count += 1
    return count


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=pathlib.Path, help="folder for the text")
    parser.add_argument("--data", default="", help="debian, python, or neither: Debian's packages where there are any")
    parser.add_argument("--cache", default="demo-text", help="folder for downloaded packages")
    options = parser.parse_args(arguments)
    try:
        count = save(data.collect(options.data, options.cache), options.output)
    except (data.DataError, OSError) as error:
        sys.exit(str(error))
    print(f"{count} documents in {options.output}")


if __name__ == "__main__":
    main()
