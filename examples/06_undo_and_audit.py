"""A detector was wrong: undo its retraction, also after a restart, and read in the audit log who did what.

The bundled model tells in its answers what it has read.
"""

import tempfile
from pathlib import Path

from kv_retract import Explicit, KVRetractSession, Message
from kv_retract.audit import AuditLog, read, verify

THREAD = [
    Message("system", "Answer each question from what was said and looked up before, in one short sentence."),
    Message("user", "By the way, my preferred hotel is Kel."),
    Message("assistant", "Understood."),
    Message("user", "Actually, my preferred hotel is Tal."),
    Message("assistant", "All right."),
    Message("user", "What is my preferred hotel?"),
]
WRONG = Explicit(match="Actually, my preferred hotel is Tal.", reason="taken for a slip of the tongue")


def open_session(folder: Path, **options: object) -> KVRetractSession:
    """Open a session as a new process would: ledger and audit log are files."""
    return KVRetractSession.from_pretrained(
        ledger=folder / "ledger.sqlite", observers=[AuditLog(folder / "audit.jsonl")], **options
    )


def main() -> None:
    """Take a preference back, find out that this was wrong, undo it in another process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_session(folder, policies=[WRONG]) as session:
            print("retracted:", session.step("trip-42", THREAD).message.content)
            [record] = session.history("trip-42")

        with open_session(folder) as session:
            session.undo("trip-42", record.retraction_id, actor="alice")
            print("undone:", session.step("trip-42", THREAD).message.content)

        for entry in read(folder / "audit.jsonl"):
            print(f"audit {entry['seq']}: {entry['event']} by {entry.get('actor', '-')}")
        print(f"the chain of {verify(folder / 'audit.jsonl').entries} entries holds")


if __name__ == "__main__":
    main()
