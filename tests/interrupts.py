"""KeyboardInterrupt at a chosen line of the package, as Ctrl-C may come at any."""

import sys


class _Tracer:
    """Counts the lines of this package that run, and interrupts at one of them."""

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __call__(self, frame, event, argument):
        if "sepme_diffusers" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.count += 1
            if self.at is not None and self.count > self.at:
                self.at = None  # once
                raise KeyboardInterrupt
        return self


def run_traced(act, at=None):
    """Run an act, interrupted at its n-th line of this package: (how many lines ran, the interrupt or None).

    Who keeps the interrupt keeps every frame that it came through alive, as a notebook does.
    """
    tracer, interrupt = _Tracer(at), None
    sys.settrace(tracer)
    try:
        act()
    except KeyboardInterrupt as error:
        interrupt = error
    finally:
        sys.settrace(None)
    return tracer.count, interrupt


def interrupted_at(line, act):
    """Whether an act was interrupted at its n-th line of this package."""
    return run_traced(act, line)[1] is not None
