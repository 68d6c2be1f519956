"""The native library: found and loaded quietly, never required."""


def loaded() -> bool:
    return False


def library_path() -> str | None:
    return None


def reason() -> str | None:
    return "the extension was not built; run `pip install --no-build-isolation -e .`"


def devices(op: str) -> tuple[str, ...]:
    return ()


def supports(op: str, device_type: str) -> bool:
    return device_type in devices(op)


def why_not(op: str | None, device_type: str) -> str:
    return reason() or f"the extension has no {op or 'op'} for {device_type} tensors"
