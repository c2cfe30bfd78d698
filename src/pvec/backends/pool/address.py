"""What ``--workers`` says: how many, and on which cluster."""

from __future__ import annotations

from dataclasses import dataclass

from pvec.errors import InputError

_FORMS = "N, an address (host:6379, ray://host:10001 or auto), or N@ADDRESS"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """``count`` workers (None: as many as there is room for) of the cluster at ``address``.

    Without an address they run on this machine, on a Ray that the command starts and ends.
    """

    count: int | None
    address: str | None

    @classmethod
    def parse(cls, text: str) -> Workers | None:
        """Read the setting; None where it is empty. Raises ``InputError`` for another text.

        >>> Workers.parse("4@head:6379")
        Workers(count=4, address='head:6379')
        """
        text = text.strip()
        if not text:
            return None
        number, separator, address = text.rpartition("@")
        if not separator and text.lstrip("-").isdigit():
            number, address = text, ""
        if number and not (number.isdigit() and int(number) > 0):
            raise InputError(
                f"--workers {text}: {number!r} is no number of workers; give {_FORMS}."
            )
        if (separator and not (number and address)) or (address and not _is_address(address)):
            raise InputError(f"--workers {text}: give {_FORMS}.")
        return cls(count=int(number) if number else None, address=address or None)


def _is_address(text: str) -> bool:
    host, _, port = text.removeprefix("ray://").rpartition(":")
    return text == "auto" or bool(
        host and port.isdigit() and "/" not in text.removeprefix("ray://")
    )
