"""One inference over Triton's HTTP port: what Kubernetes asks the server container by exec.

Triton's own readiness stays true when a backend has died (it answers 500 to every request), and a
probe in a side car could only restart the side car. Standard library only, so that it runs in
every image that has Python: the CPU image and NVIDIA's container.

    probe.py ready    exit code 0: a synthetic scan was answered with probabilities
    probe.py live     the same, or the server is there and refuses work because its queue is full
"""

import http.client
import json
import os
import struct
import sys

MODEL = os.environ.get("CHESTCT_MODEL", "chestct")
PORT = int(os.environ.get("CHESTCT_HTTP_PORT", "8000"))
TIMEOUT_S = float(os.environ.get("CHESTCT_PROBE_TIMEOUT_S", "10"))
SHAPE = (1, 224, 224, 1)  # the contract's input `scan`, uint8


def main(question: str) -> int:
    """Asks once; tells on stderr why an answer is not good enough."""
    scan = bytes((x ^ y) & 255 for x in range(SHAPE[1]) for y in range(SHAPE[2]))
    # The binary form of the V2 protocol: a JSON header, then the raw bytes.
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "scan",
                    "shape": SHAPE,
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": len(scan)},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        }
    ).encode()
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
    try:
        connection.request(
            "POST",
            f"/v2/models/{MODEL}/infer",
            body=header + scan,
            headers={
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(header)),
                "Connection": "close",
            },
        )
        answer = connection.getresponse()
        body = answer.read()
    except OSError as error:
        sys.stderr.write(f"probe: no answer on port {PORT}: {error}\n")
        return 1
    finally:
        connection.close()
    if answer.status == 503 and question == "live":
        return 0
    if answer.status != 200:
        sys.stderr.write(f"probe: {answer.status}: {body[:300].decode(errors='replace')}\n")
        return 1
    values = body[int(answer.headers.get("Inference-Header-Content-Length", len(body))) :]
    total = sum(struct.unpack(f"<{len(values) // 4}f", values)) if values else 0.0
    if abs(total - 1) > 1e-3:
        sys.stderr.write(f"probe: the probabilities add up to {total}, expected 1\n")
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["ready"], ["live"]):
        sys.exit("usage: probe.py ready|live")
    sys.exit(main(sys.argv[1]))
