"""A driver to be killed: labels a project's first block as its asset does, and says the digest of its ledger.

python -m bench.label_driver PROJECT.json LABEL
"""

import sys
from pathlib import Path

from fourmill.runtime.project import read_project
from fourmill.runtime.session import Session
from fourmill.runtime.stages import label_stage, publish_ledger, run_block


def main() -> None:
    """Run the stage."""
    session = Session(read_project(Path(sys.argv[1])))
    stage, block = label_stage(session, sys.argv[2]), session.project.layout.block_keys()[0]
    print(publish_ledger(session, stage, block, run_block(session, stage, block)).digest)


if __name__ == "__main__":
    main()
