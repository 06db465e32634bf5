# SPDX-License-Identifier: Apache-2.0
"""What tests do to the local S3 of the fixture ``s3``."""

from pathlib import Path


def upload(folder: Path, bucket: str) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=str(path.relative_to(folder)), Body=path.read_bytes())
