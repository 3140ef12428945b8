"""A service that classifies uploaded files: uvicorn --app-dir examples fastapi_app:app."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, UploadFile

from chestct import AsyncScanClient, ScanDecodeError, ServerError

client = AsyncScanClient(os.environ.get("CHESTCT_URL", "grpc://127.0.0.1:8001"))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Connect once, for all requests."""
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(file: UploadFile) -> dict[str, Any]:
    """The record of one PNG, JPEG or DICOM file."""
    try:
        record = await client.classify_file(await file.read(), timeout_s=10)
    except ScanDecodeError as error:
        raise HTTPException(422, str(error)) from error
    except ServerError as error:
        detail = {"code": error.code, "message": str(error)}
        raise HTTPException(503 if error.retryable else 502, detail) from error
    return {**record, "path": file.filename}
