"""A driver to be killed: labels a project's first block as its assets do in one run, and says the digests of the ledgers.

python -m bench.label_driver PROJECT.json LABEL [LABEL ...]
"""

import json
import sys
from pathlib import Path

from fourmill.runtime.project import read_project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import label_stage, publish_ledger, run_block


def main() -> None:
    """Run the stages, in order; a line of JSON for each."""
    session, labels = Session(read_project(Path(sys.argv[1]))), sys.argv[2:]
    block = session.project.layout.block_keys()[0]
    for label in labels:
        stage = label_stage(session, label, labels)
        made = run_block(session, stage, block)
        digest = publish_ledger(session, stage, block, made).digest
        print(json.dumps({"label": label, "made": made, "digest": digest}), flush=True)


if __name__ == "__main__":
    main()
