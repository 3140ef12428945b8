"""The AWS set-up against moto's server on loopback: what it makes, keeps, mends and refuses."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from deploy.aws.provision import (
    DEBIAN,
    Plan,
    Provisioner,
    ProvisionError,
    main,
    pull_policy,
    push_policy,
    user_data,
)

REGION = "eu-central-1"
ACCOUNT = "123456789012"
ARN = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/chestct"
ARGUMENTS = [
    *("--admin-cidr", "203.0.113.7/32", "--client-cidr", "198.51.100.0/24"),
    *("--trigger-cidr", "192.0.2.0/28", "--client-port", "8001", "--key-name", "me"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def aws(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A new account with one key pair; gives a function that makes clients."""
    import requests
    from moto.ssm import ssm_backends
    from moto.ssm.models import Parameter

    variables = {
        "AWS_ENDPOINT_URL": server,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    requests.post(f"{server}/moto-api/reset", timeout=20).raise_for_status()
    boto3.client("ec2").create_key_pair(KeyName="me")
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    # AWS publishes it; nobody can put a parameter under /aws, so it is laid into moto's memory.
    backend = ssm_backends[ACCOUNT][REGION]
    backend._parameters[DEBIAN].append(
        Parameter(ACCOUNT, DEBIAN, image, "String", "", None, None, 0, 1, [], REGION)
    )
    return boto3.client


def provision(capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    assert main([*ARGUMENTS, *more]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def instances(aws: Any) -> dict[str, Any]:
    return {
        tag["Value"]: instance
        for reservation in aws("ec2").describe_instances()["Reservations"]
        for instance in reservation["Instances"]
        for tag in instance["Tags"]
        if tag["Key"] == "Name"
    }


def openings(aws: Any, name: str) -> set[tuple[int, str]]:
    found = aws("ec2").describe_security_groups(Filters=[{"Name": "group-name", "Values": [name]}])[
        "SecurityGroups"
    ][0]
    return {
        (permission["FromPort"], source)
        for permission in found["IpPermissions"]
        for source in (
            [entry["CidrIp"] for entry in permission["IpRanges"]]
            + [entry["GroupId"] for entry in permission["UserIdGroupPairs"]]
        )
    }


def test_dry_run_changes_nothing(aws, capsys):
    lines = provision(capsys, "--dry-run")
    assert len(lines) > 15
    assert {line.split()[0] for line in lines} == {"would"}
    assert aws("ecr").describe_repositories()["repositories"] == []
    assert aws("iam").list_roles()["Roles"] == []
    assert aws("iam").list_users()["Users"] == []
    assert instances(aws) == {}
    groups = aws("ec2").describe_security_groups()["SecurityGroups"]
    assert [group["GroupName"] for group in groups] == ["default"]


def test_dry_run_names_what_a_run_then_does(aws, capsys):
    planned = provision(capsys, "--dry-run")
    done = provision(capsys)
    group = next(line.split()[5] for line in done if "Jenkins: deploys" in line)
    assert [line.replace("sg-not-made-yet", group) for line in planned] == [
        f"would {line}" for line in done
    ]


def test_second_run_keeps_everything(aws, capsys):
    done = provision(capsys)
    assert not any(line.startswith("keep") for line in done)
    again = provision(capsys)
    assert again
    assert {line.split()[0] for line in again} == {"keep"}
    assert len(instances(aws)) == 2


def test_repository_scans_and_its_tags_do_not_move(aws, capsys):
    provision(capsys)
    (repository,) = aws("ecr").describe_repositories()["repositories"]
    assert repository["repositoryName"] == "chestct"
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"] == {"scanOnPush": True}
    text = aws("ecr").get_lifecycle_policy(repositoryName="chestct")["lifecyclePolicyText"]
    rules = json.loads(text)["rules"]
    assert rules[0]["selection"]["tagStatus"] == "untagged"
    prefixes = [rule["selection"].get("tagPrefixList") for rule in rules[1:]]
    assert prefixes == [["edge-"], ["server-"], ["client-"]]


def test_rights_are_the_least_and_of_one_repository(aws, capsys):
    provision(capsys)
    role = aws("iam").get_role_policy(
        RoleName="chestct-application", PolicyName="chestct-application"
    )["PolicyDocument"]
    user = aws("iam").get_user_policy(UserName="chestct-jenkins", PolicyName="chestct-jenkins")[
        "PolicyDocument"
    ]
    assert (role, user) == (pull_policy(ARN), push_policy(ARN))
    for policy in (role, user):
        log_in, rest = policy["Statement"]
        assert (log_in["Action"], log_in["Resource"]) == ("ecr:GetAuthorizationToken", "*")
        assert rest["Resource"] == ARN
        assert all("*" not in action for action in rest["Action"])
    assert not {"ecr:PutImage", "ecr:UploadLayerPart"} & set(role["Statement"][1]["Action"])
    assert "ecr:DeleteRepository" not in user["Statement"][1]["Action"]
    assert not any("Delete" in action for action in user["Statement"][1]["Action"])
    assert aws("iam").list_access_keys(UserName="chestct-jenkins")["AccessKeyMetadata"] == []


def test_instances_want_imdsv2_and_encrypt_their_disks(aws, capsys):
    provision(capsys)
    found = instances(aws)
    assert set(found) == {"chestct-jenkins", "chestct-application"}
    for name, instance in found.items():
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert instance["KeyName"] == "me"
        volumes = [m["Ebs"]["VolumeId"] for m in instance["BlockDeviceMappings"]]
        described = aws("ec2").describe_volumes(VolumeIds=volumes)["Volumes"]
        assert described
        assert all(volume["Encrypted"] for volume in described)
        answer = aws("ec2").describe_instance_attribute(
            InstanceId=instance["InstanceId"], Attribute="userData"
        )
        script = base64.b64decode(answer["UserData"]["Value"]).decode()
        assert script == user_data(name.partition("-")[2])
    profile = found["chestct-application"]["IamInstanceProfile"]["Arn"]
    assert profile.endswith("/chestct-application")
    assert "IamInstanceProfile" not in found["chestct-jenkins"]


def test_only_the_given_ranges_are_let_in(aws, capsys):
    provision(capsys)
    groups = aws("ec2").describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["chestct-jenkins"]}]
    )["SecurityGroups"]
    assert openings(aws, "chestct-jenkins") == {
        (22, "203.0.113.7/32"),
        (443, "203.0.113.7/32"),
        (443, "192.0.2.0/28"),
    }
    assert openings(aws, "chestct-application") == {
        (22, groups[0]["GroupId"]),
        (22, "203.0.113.7/32"),
        (8001, "198.51.100.0/24"),
    }


def test_what_somebody_opened_or_loosened_is_mended(aws, capsys):
    provision(capsys)
    ec2 = aws("ec2")
    group = ec2.describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["chestct-jenkins"]}]
    )["SecurityGroups"][0]["GroupId"]
    opened = [
        {
            "IpProtocol": "tcp",
            "FromPort": 8080,
            "ToPort": 8080,
            "IpRanges": [{"CidrIp": "0.0.0.0/0"}],
        },
        {"IpProtocol": "-1", "Ipv6Ranges": [{"CidrIpv6": "::/0"}]},
    ]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=opened)
    aws("ecr").put_image_tag_mutability(repositoryName="chestct", imageTagMutability="MUTABLE")
    instance = instances(aws)["chestct-jenkins"]["InstanceId"]
    ec2.modify_instance_metadata_options(InstanceId=instance, HttpTokens="optional")
    changed = [line for line in provision(capsys) if not line.startswith("keep")]
    assert [line.split()[0] for line in changed] == ["make", "close", "close", "require"]
    assert (8080, "0.0.0.0/0") not in openings(aws, "chestct-jenkins")
    assert not any(line for line in provision(capsys) if not line.startswith("keep"))


def test_other_rights_of_the_user_are_an_error(aws, capsys):
    provision(capsys)
    aws("iam").put_user_policy(
        UserName="chestct-jenkins",
        PolicyName="everything",
        PolicyDocument=json.dumps(push_policy("*")),
    )
    assert main(ARGUMENTS) == 1
    assert "chestct-jenkins has other rights: everything" in capsys.readouterr().err


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "::/0", "0.0.0.0/1"])
@pytest.mark.parametrize("flag", ["--admin-cidr", "--trigger-cidr", "--client-cidr"])
def test_the_whole_world_is_refused_unless_forced(aws, capsys, flag, cidr):
    assert main([*ARGUMENTS, flag, cidr, "--dry-run"]) == 1
    assert f"{cidr} opens ports to" in capsys.readouterr().err
    assert main([*ARGUMENTS, flag, cidr, "--dry-run", "--open-to-the-world"]) == 0


@pytest.mark.parametrize("cidr", ["203.0.113.7/24", "example.org", ""])
def test_a_range_that_is_none_is_refused(cidr):
    with pytest.raises(ProvisionError, match=r"expected a range like 203\.0\.113\.7/32"):
        Plan("chestct", (cidr,), (), (), (8001,), "me")


def test_a_key_pair_that_is_missing_is_named(aws, capsys):
    arguments = [*ARGUMENTS[:-1], "another"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "there is no EC2 key pair 'another'" in error
    assert "import-key-pair" in error


def test_no_region_is_one_line(aws, capsys, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    assert main(ARGUMENTS) == 1
    assert capsys.readouterr().err == "provision: no region: set AWS_DEFAULT_REGION\n"


def test_failing_half_way_is_made_good_by_the_next_run(aws, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ProvisionError("the connection is lost")

    with monkeypatch.context() as patched:
        patched.setattr(Provisioner, "_group", fail)
        assert main(ARGUMENTS) == 1
    lines = provision(capsys)
    assert any(line.startswith("keep ECR repository") for line in lines)
    assert len(instances(aws)) == 2


@pytest.mark.parametrize("kind", ["jenkins", "application"])
def test_user_data_is_one_script_that_ec2_takes(kind):
    script = user_data(kind)
    assert script.startswith("#!/usr/bin/env bash\n")
    assert script.count("#!/") == 1
    assert len(script.encode()) <= 16384  # the limit of EC2 before it is encoded
    assert "apt-key" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
