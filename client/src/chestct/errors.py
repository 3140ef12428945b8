"""What can go wrong, as one tree.

ChestCTError
+-- ScanDecodeError          a file is not a readable axial slice
|   +-- OutOfDomainError     a DICOM file whose tags say that it is no axial CT slice
|   +-- DecoderCrashedError  decoding ended the process that it ran in, or ran too long
+-- ReportError              DICOM objects cannot be made of a result
+-- SpoolError               the queue of a DICOM node cannot be used
|   +-- SpoolFullError       it holds as much as it may
+-- ServerError
    +-- ServerUnavailableError   nobody answers, or the model is not ready
    +-- InferenceTimeoutError    the deadline passed
    +-- ContractError            the server's model is not the one this client was made for
    +-- ModelExchangedError      the server has changed to another model since `connect`
    +-- InferenceError           the server refused or failed one request
"""

from typing import ClassVar

__all__ = [
    "ChestCTError",
    "ContractError",
    "DecoderCrashedError",
    "InferenceError",
    "InferenceTimeoutError",
    "ModelExchangedError",
    "OutOfDomainError",
    "ReportError",
    "ScanDecodeError",
    "ServerError",
    "ServerUnavailableError",
    "SpoolError",
    "SpoolFullError",
]


class ChestCTError(Exception):
    """Base of all errors that this package raises on purpose."""


class ScanDecodeError(ChestCTError):
    """A file that cannot be turned into a scan; the message names the file and the remedy."""


class OutOfDomainError(ScanDecodeError):
    """A DICOM file that is no axial CT slice by its own tags; the message gives every reason.

    Attributes:
        kind: `localizer`, `coronal` and so on, see `chestct.imaging.metadata.dicom_kind`.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class DecoderCrashedError(ScanDecodeError):
    """A file whose decoding ended the process that it ran in, or did not end in its time."""


class ServerError(ChestCTError):
    """Base of all errors that come from a server or from the way to it.

    Attributes:
        code: Short name of the kind of error, the same over gRPC and HTTP.
        retryable: Whether the same call may succeed later.
        url: Address of the server; empty where several are concerned.
    """

    code: ClassVar[str] = "server"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", url: str = "") -> None:
        super().__init__(message)
        self.url = url


class ServerUnavailableError(ServerError):
    """No server answers at the address, or its model is not ready."""

    code = "unavailable"
    retryable = True


class InferenceTimeoutError(ServerError):
    """The deadline of a call passed before the answer came."""

    code = "timeout"
    retryable = True


class ContractError(ServerError):
    """The server's model differs from the contract; the message lists all differences."""

    code = "contract"


class ModelExchangedError(ServerError):
    """A server has changed to a model that is not comparable with the one of `connect`.

    Either two versions answered parts of one call: classify again. Or labels or window are others:
    connect again, prepare the scans in the new window, and classify again.
    """

    code = "model_exchanged"


class InferenceError(ServerError):
    """The server answered a request with an error."""

    code = "inference"


class ReportError(ChestCTError):
    """DICOM objects cannot be made of a result; the message says what is missing."""


class SpoolError(ChestCTError):
    """The queue of a DICOM node cannot be used; the message says why."""


class SpoolFullError(SpoolError):
    """The queue of a DICOM node holds as much as it may."""
