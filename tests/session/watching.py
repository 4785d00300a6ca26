"""What the tests of sessions share: an observer that keeps events, and a proposal of one message."""

from kv_retract import Observer, Retraction, SpanRef


class Notes(Observer):
    """Keeps every event; as a required observer it raises on kinds that it is told to refuse."""

    def __init__(self, refuse=(), *, required=False):
        self.events, self.refuse, self.required = [], refuse, required

    def on_event(self, event):
        if isinstance(event, self.refuse):
            raise OSError("no space left")
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def of_message(i, **kw):
    return Retraction(**{"span": SpanRef(i), "policy": "explicit", "reason": "test", **kw})
