"""Sets up what a deployment needs in AWS, and changes nothing that is as it should be.

An ECR repository, least rights for whoever pushes and pulls, two security groups, and two EC2
instances: Jenkins and the application host. Every step looks first, so that a second run only
reports; `--dry-run` only looks. Not run against AWS: tested against moto's server.

    python -m deploy.aws.provision --admin-cidr 203.0.113.7/32 --key-name me --dry-run
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

FOLDER = Path(__file__).parent
# Published by Debian for each region; the root device of its images is /dev/xvda.
DEBIAN = "/aws/service/debian/release/13/latest/amd64"
ROOT_DEVICE = "/dev/xvda"
# The ECR addresses that images are pulled through are not in reach of a policy by resource.
LOG_IN = {"Effect": "Allow", "Action": "ecr:GetAuthorizationToken", "Resource": "*"}
PULL = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
PUSH = [
    "ecr:BatchCheckLayerAvailability",
    "ecr:CompleteLayerUpload",
    "ecr:DescribeImages",
    "ecr:InitiateLayerUpload",
    "ecr:PutImage",
    "ecr:UploadLayerPart",
]
IMAGES_KEPT = 20  # of each kind: far more than the two that a host may run


class ProvisionError(Exception):
    """What AWS holds, or what was asked for, does not allow to go on."""


@dataclass(frozen=True)
class Rule:
    """One opening of a security group: TCP ports from a CIDR, or from another group."""

    port: int
    source: str
    why: str

    def permission(self) -> dict[str, Any]:
        """The rule as EC2 wants it."""
        base = {"IpProtocol": "tcp", "FromPort": self.port, "ToPort": self.port}
        if self.source.startswith("sg-"):
            pair = {"GroupId": self.source, "Description": self.why}
            return base | {"UserIdGroupPairs": [pair]}
        if ipaddress.ip_network(self.source).version == 6:
            return base | {"Ipv6Ranges": [{"CidrIpv6": self.source, "Description": self.why}]}
        return base | {"IpRanges": [{"CidrIp": self.source, "Description": self.why}]}


@dataclass(frozen=True)
class Plan:
    """What is to stand in AWS.

    Attributes:
        name: Prefix of every name, and the name of the ECR repository.
        admin_cidrs: Who reaches SSH and Jenkins.
        trigger_cidrs: Who besides may start jobs: Jenkins by HTTPS.
        client_cidrs: Who sends scans: the page, and Triton's gRPC and HTTP.
        client_ports: TCP ports that these reach on the application host.
        key_name: EC2 key pair for the first login; must exist.
        jenkins_type: Instance type of Jenkins; the test suite wants 2 cores and 8 GB.
        application_type: Instance type of the application host.
        disk_gb: Size of each root disk, encrypted.
        ami: Image of both instances; by default Debian's latest.
        subnet: Where the instances stand; by default the default subnet of the first zone.
        allow_world: Whether 0.0.0.0/0 and other very wide ranges are accepted.
    """

    name: str
    admin_cidrs: tuple[str, ...]
    trigger_cidrs: tuple[str, ...]
    client_cidrs: tuple[str, ...]
    client_ports: tuple[int, ...]
    key_name: str
    jenkins_type: str = "m7i.large"
    application_type: str = "c7i.large"
    disk_gb: int = 40
    ami: str | None = None
    subnet: str | None = None
    allow_world: bool = False

    def __post_init__(self) -> None:
        """Raises ProvisionError for a CIDR that is none, or wider than /8 (IPv6: /32)."""
        for text in (*self.admin_cidrs, *self.trigger_cidrs, *self.client_cidrs):
            try:
                network = ipaddress.ip_network(text)
            except ValueError as error:
                raise ProvisionError(f"{error}; expected a range like 203.0.113.7/32") from error
            widest = 8 if network.version == 4 else 32
            if network.prefixlen < widest and not self.allow_world:
                raise ProvisionError(
                    f"{text} opens ports to {network.num_addresses} addresses; name the range "
                    "that needs them, or add --open-to-the-world"
                )
        for port in self.client_ports:
            if not 0 < port < 65536:
                raise ProvisionError(f"{port} is no TCP port, expected 1 to 65535")

    def jenkins_rules(self) -> list[Rule]:
        """SSH for the administrators, HTTPS for them and for what starts jobs."""
        rules = [Rule(22, cidr, "administrators: SSH") for cidr in self.admin_cidrs]
        rules += [Rule(443, cidr, "administrators: Jenkins") for cidr in self.admin_cidrs]
        return rules + [
            Rule(443, cidr, "starts jobs")
            for cidr in self.trigger_cidrs
            if cidr not in self.admin_cidrs
        ]

    def application_rules(self, jenkins_group: str) -> list[Rule]:
        """SSH for Jenkins and the administrators, the service for its clients."""
        rules = [Rule(22, jenkins_group, "Jenkins: deploys")]
        rules += [Rule(22, cidr, "administrators: SSH") for cidr in self.admin_cidrs]
        return rules + [
            Rule(port, cidr, "clients") for port in self.client_ports for cidr in self.client_cidrs
        ]


def pull_policy(repository_arn: str) -> dict[str, Any]:
    """What the application host may do: pull from the one repository."""
    return _policy(LOG_IN, {"Effect": "Allow", "Action": PULL, "Resource": repository_arn})


def push_policy(repository_arn: str) -> dict[str, Any]:
    """What Jenkins may do: push to the one repository and read which digest it has."""
    return _policy(LOG_IN, {"Effect": "Allow", "Action": PUSH, "Resource": repository_arn})


def lifecycle_policy() -> dict[str, Any]:
    """Deletes untagged images after a week and keeps the last of each kind."""
    rules: list[dict[str, Any]] = [
        {
            "rulePriority": 1,
            "description": "untagged images go after a week",
            "selection": {
                "tagStatus": "untagged",
                "countType": "sinceImagePushed",
                "countUnit": "days",
                "countNumber": 7,
            },
            "action": {"type": "expire"},
        }
    ]
    for priority, kind in enumerate(("edge", "server", "client"), start=2):
        rules.append(
            {
                "rulePriority": priority,
                "description": f"the last {IMAGES_KEPT} {kind} images stay",
                "selection": {
                    "tagStatus": "tagged",
                    "tagPrefixList": [f"{kind}-"],
                    "countType": "imageCountMoreThan",
                    "countNumber": IMAGES_KEPT,
                },
                "action": {"type": "expire"},
            }
        )
    return {"rules": rules}


def _policy(*statements: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}


class Provisioner:
    """Brings an account to a plan, step by step; each step reports what it did."""

    def __init__(self, plan: Plan, *, dry_run: bool, report: Callable[[str], None]) -> None:
        self._plan = plan
        self._dry_run = dry_run
        self._report = report
        session = boto3.Session()
        if session.region_name is None:
            raise ProvisionError("no region: set AWS_DEFAULT_REGION")
        self._region = session.region_name
        self._ecr, self._iam, self._ec2, self._ssm, self._sts = map(
            session.client, ("ecr", "iam", "ec2", "ssm", "sts")
        )
        self._account = self._sts.get_caller_identity()["Account"]

    def run(self) -> None:
        """Does every step in the order in which one needs the other."""
        name = self._plan.name
        arn = self._repository()
        self._user(f"{name}-jenkins", push_policy(arn))
        self._role(f"{name}-application", pull_policy(arn))
        vpc, subnet = self._network()
        jenkins = self._group(f"{name}-jenkins", vpc, lambda _: self._plan.jenkins_rules())
        group = self._group(
            f"{name}-application", vpc, lambda _: self._plan.application_rules(jenkins)
        )
        self._instance(f"{name}-jenkins", self._plan.jenkins_type, jenkins, subnet, profile=None)
        self._instance(
            f"{name}-application",
            self._plan.application_type,
            group,
            subnet,
            profile=f"{name}-application",
        )

    def _step(self, what: str, do: Callable[[], Any]) -> Any:
        """Does it and says so, or says only that it would."""
        if self._dry_run:
            self._report(f"would {what}")
            return None
        done = do()
        self._report(what)
        return done

    def _keep(self, what: str) -> None:
        self._report(f"keep {what}")

    # ECR

    def _repository(self) -> str:
        name = self._plan.name
        found = _or_none(
            "RepositoryNotFoundException",
            lambda: self._ecr.describe_repositories(repositoryNames=[name])["repositories"][0],
        )
        if found is None:
            self._step(
                f"create ECR repository {name}: scan on push, tags that do not move, encrypted",
                lambda: self._ecr.create_repository(
                    repositoryName=name,
                    imageTagMutability="IMMUTABLE",
                    imageScanningConfiguration={"scanOnPush": True},
                    encryptionConfiguration={"encryptionType": "AES256"},
                ),
            )
        else:
            self._keep(f"ECR repository {name}")
            if found["imageTagMutability"] != "IMMUTABLE":
                self._step(
                    f"make the tags of {name} immutable",
                    lambda: self._ecr.put_image_tag_mutability(
                        repositoryName=name, imageTagMutability="IMMUTABLE"
                    ),
                )
            if not found["imageScanningConfiguration"]["scanOnPush"]:
                self._step(
                    f"scan {name} on push",
                    lambda: self._ecr.put_image_scanning_configuration(
                        repositoryName=name, imageScanningConfiguration={"scanOnPush": True}
                    ),
                )
        self._lifecycle(exists=found is not None)
        return f"arn:aws:ecr:{self._region}:{self._account}:repository/{name}"

    def _lifecycle(self, *, exists: bool) -> None:
        name, wanted = self._plan.name, lifecycle_policy()
        present = exists and _or_none(
            "LifecyclePolicyNotFoundException",
            lambda: self._ecr.get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"],
        )
        if present and json.loads(present) == wanted:
            self._keep(f"lifecycle rules of {name}")
            return
        self._step(
            f"set lifecycle rules of {name}: untagged 7 days, the last {IMAGES_KEPT} of each kind",
            lambda: self._ecr.put_lifecycle_policy(
                repositoryName=name, lifecyclePolicyText=json.dumps(wanted)
            ),
        )

    # IAM

    def _user(self, name: str, policy: dict[str, Any]) -> None:
        found = _or_none("NoSuchEntity", lambda: self._iam.get_user(UserName=name))
        if found is None:
            self._step(
                f"create IAM user {name} (no key: see the guide)",
                lambda: self._iam.create_user(UserName=name),
            )
        else:
            self._keep(f"IAM user {name}")
        self._inline_policy("user", name, policy, exists=found is not None)

    def _role(self, name: str, policy: dict[str, Any]) -> None:
        trust = _policy(
            {
                "Effect": "Allow",
                "Principal": {"Service": "ec2.amazonaws.com"},
                "Action": "sts:AssumeRole",
            }
        )
        found = _or_none("NoSuchEntity", lambda: self._iam.get_role(RoleName=name)["Role"])
        if found is None:
            self._step(
                f"create IAM role {name} for EC2",
                lambda: self._iam.create_role(
                    RoleName=name, AssumeRolePolicyDocument=json.dumps(trust)
                ),
            )
        elif found["AssumeRolePolicyDocument"] != trust:
            self._step(
                f"let only EC2 take the role {name}",
                lambda: self._iam.update_assume_role_policy(
                    RoleName=name, PolicyDocument=json.dumps(trust)
                ),
            )
        else:
            self._keep(f"IAM role {name}")
        self._inline_policy("role", name, policy, exists=found is not None)
        profile = _or_none(
            "NoSuchEntity",
            lambda: self._iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"],
        )
        if profile is None:
            self._step(
                f"create instance profile {name}",
                lambda: self._iam.create_instance_profile(InstanceProfileName=name),
            )
        else:
            self._keep(f"instance profile {name}")
        if profile is None or not profile["Roles"]:
            self._step(
                f"put the role {name} into its instance profile",
                lambda: self._iam.add_role_to_instance_profile(
                    InstanceProfileName=name, RoleName=name
                ),
            )

    def _inline_policy(self, kind: str, name: str, policy: dict[str, Any], *, exists: bool) -> None:
        """The one policy of a user or a role; any other right it has is an error."""
        own = {"UserName" if kind == "user" else "RoleName": name}
        call: Callable[..., Any] = lambda verb, noun: getattr(self._iam, f"{verb}_{kind}_{noun}")  # noqa: E731
        if exists:
            attached = self._iam.get_paginator(f"list_attached_{kind}_policies").paginate(**own)
            others = [p["PolicyName"] for page in attached for p in page["AttachedPolicies"]]
            others += [p for p in call("list", "policies")(**own)["PolicyNames"] if p != name]
            if others:
                raise ProvisionError(
                    f"the {kind} {name} has other rights: {', '.join(others)}; expected only the "
                    f"policy {name}. Remove them, or choose another --name."
                )
            present = _or_none(
                "NoSuchEntity",
                lambda: call("get", "policy")(**own, PolicyName=name)["PolicyDocument"],
            )
            if present == policy:
                self._keep(f"policy of the {kind} {name}")
                return
        self._step(
            f"set policy of the {kind} {name}: {', '.join(_actions(policy))}",
            lambda: call("put", "policy")(
                **own, PolicyName=name, PolicyDocument=json.dumps(policy)
            ),
        )

    # EC2

    def _network(self) -> tuple[str, str]:
        """VPC and subnet of the instances."""
        if self._plan.subnet:
            wanted: dict[str, Any] = {"SubnetIds": [self._plan.subnet]}
        else:
            wanted = {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]}
        subnets = self._ec2.describe_subnets(**wanted)["Subnets"]
        if not subnets:
            raise ProvisionError("there is no default subnet; name one with --subnet")
        first = min(subnets, key=lambda subnet: str(subnet["AvailabilityZone"]))
        return first["VpcId"], first["SubnetId"]

    def _group(self, name: str, vpc: str, rules: Callable[[str], list[Rule]]) -> str:
        found = self._ec2.describe_security_groups(
            Filters=[
                {"Name": "group-name", "Values": [name]},
                {"Name": "vpc-id", "Values": [vpc]},
            ]
        )["SecurityGroups"]
        if found:
            self._keep(f"security group {name}")
            group = found[0]
        else:
            made = self._step(
                f"create security group {name}",
                lambda: self._ec2.create_security_group(
                    GroupName=name, Description=f"{name}: see deploy/aws", VpcId=vpc
                ),
            )
            group = {"GroupId": made["GroupId"] if made else "sg-not-made-yet"}
        self._rules(name, group, rules(group["GroupId"]))
        return str(group["GroupId"])

    def _rules(self, name: str, group: dict[str, Any], rules: Iterable[Rule]) -> None:
        """Exactly these openings: a missing one is made, any other is closed."""
        wanted = {(rule.port, rule.port, rule.source): rule for rule in rules}
        present = dict(_openings(group.get("IpPermissions", [])))
        for key, rule in wanted.items():
            text = f"{name}: port {rule.port} for {rule.source} ({rule.why})"
            if key in present:
                self._keep(text)
            else:
                self._step(
                    f"open {text}",
                    partial(
                        self._ec2.authorize_security_group_ingress,
                        GroupId=group["GroupId"],
                        IpPermissions=[rule.permission()],
                    ),
                )
        for (low, high, source), permission in present.items():
            if (low, high, source) not in wanted:
                self._step(
                    f"close {name}: ports {low} to {high} for {source}, which nothing here needs",
                    partial(
                        self._ec2.revoke_security_group_ingress,
                        GroupId=group["GroupId"],
                        IpPermissions=[permission],
                    ),
                )

    def _instance(
        self, name: str, instance_type: str, group: str, subnet: str, *, profile: str | None
    ) -> None:
        alive = ["pending", "running", "stopping", "stopped"]
        found = [
            instance
            for reservation in self._ec2.describe_instances(
                Filters=[
                    {"Name": "tag:Name", "Values": [name]},
                    {"Name": "instance-state-name", "Values": alive},
                ]
            )["Reservations"]
            for instance in reservation["Instances"]
        ]
        if found:
            for instance in found:
                self._keep(f"instance {name}, {instance['InstanceId']}")
                if instance.get("MetadataOptions", {}).get("HttpTokens") != "required":
                    self._step(
                        f"require IMDSv2 on {name}",
                        partial(
                            self._ec2.modify_instance_metadata_options,
                            InstanceId=instance["InstanceId"],
                            HttpTokens="required",
                            HttpPutResponseHopLimit=1,
                        ),
                    )
            return
        keys = self._ec2.describe_key_pairs()["KeyPairs"]
        if self._plan.key_name not in {key["KeyName"] for key in keys}:
            raise ProvisionError(
                f"there is no EC2 key pair {self._plan.key_name!r} in {self._region}; import your "
                "public key: aws ec2 import-key-pair --key-name NAME --public-key-material FILE"
            )
        image = self._plan.ami or self._ssm.get_parameter(Name=DEBIAN)["Parameter"]["Value"]
        tags = [{"Key": "Name", "Value": name}]
        options: dict[str, Any] = {
            "ImageId": image,
            "InstanceType": instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "KeyName": self._plan.key_name,
            "SecurityGroupIds": [group],
            "SubnetId": subnet,
            "UserData": user_data(name.removeprefix(f"{self._plan.name}-")),
            # One hop: a container cannot ask for the host's credentials.
            "MetadataOptions": {
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": 1,
                "HttpEndpoint": "enabled",
            },
            "BlockDeviceMappings": [
                {
                    "DeviceName": ROOT_DEVICE,
                    "Ebs": {
                        "VolumeSize": self._plan.disk_gb,
                        "VolumeType": "gp3",
                        "Encrypted": True,
                        "DeleteOnTermination": True,
                    },
                }
            ],
            "TagSpecifications": [
                {"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")
            ],
        }
        if profile is not None:
            options["IamInstanceProfile"] = {"Name": profile}
        self._step(
            f"start instance {name}: {instance_type}, {self._plan.disk_gb} GB encrypted, IMDSv2 "
            "only",
            lambda: self._run_instance(options),
        )

    def _run_instance(self, options: dict[str, Any]) -> None:
        """Asks EC2 again for a while: a new instance profile is not known everywhere at once."""
        for pauses_left in reversed(range(10)):
            try:
                self._ec2.run_instances(**options)
                return
            except ClientError as error:
                if "Invalid IAM Instance Profile" not in str(error) or not pauses_left:
                    raise
                time.sleep(3)


def user_data(kind: str) -> str:
    """The script that an instance runs at its first start: what both need, then its own part."""
    own = (FOLDER / f"{kind}.sh").read_text()
    return (FOLDER / "common.sh").read_text() + own.partition("\n")[2]


def _actions(policy: dict[str, Any]) -> list[str]:
    """The actions that a policy allows."""
    listed = [statement["Action"] for statement in policy["Statement"]]
    return [a for action in listed for a in ([action] if isinstance(action, str) else action)]


def _openings(
    permissions: Iterable[dict[str, Any]],
) -> Iterable[tuple[tuple[int, int, str], dict[str, Any]]]:
    """Each single opening, with the permission that closes only it."""
    for permission in permissions:
        base = {k: permission[k] for k in ("IpProtocol", "FromPort", "ToPort") if k in permission}
        ports = permission.get("FromPort", 0), permission.get("ToPort", 65535)
        for field, key in (
            ("IpRanges", "CidrIp"),
            ("Ipv6Ranges", "CidrIpv6"),
            ("UserIdGroupPairs", "GroupId"),
            ("PrefixListIds", "PrefixListId"),
        ):
            for source in permission.get(field, []):
                entry = {key: source[key]}
                source_text = (
                    source[key]
                    if base["IpProtocol"] == "tcp"
                    else (f"{source[key]} by protocol {base['IpProtocol']}")
                )
                yield (*ports, source_text), base | {field: [entry]}


def _or_none(code: str, ask: Callable[[], Any]) -> Any:
    """The answer, or None where AWS says by this error code that there is no such thing."""
    try:
        return ask()
    except ClientError as error:
        if error.response["Error"]["Code"] != code:
            raise
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.aws.provision",
        description="Set up ECR, IAM, security groups, Jenkins and the application host in AWS.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--name", default="chestct", help="prefix of every name, and the ECR repository")
    cidrs: dict[str, Any] = {"action": "append", "metavar": "CIDR"}
    add("--admin-cidr", **cidrs, required=True, help="who reaches SSH and Jenkins; repeatable")
    add("--trigger-cidr", **cidrs, default=[], help="who else starts Jenkins jobs; repeatable")
    add("--client-cidr", **cidrs, default=[], help="who sends scans; repeatable")
    add(
        "--client-port",
        action="append",
        type=int,
        metavar="PORT",
        help="port that these reach; repeatable (default: 8000 HTTP, 8001 gRPC, 8080 page)",
    )
    add("--key-name", required=True, help="EC2 key pair of the administrator; must exist")
    add("--jenkins-type", default=Plan.jenkins_type, help="instance type of Jenkins")
    add("--application-type", default=Plan.application_type, help="... of the application host")
    add("--disk-gb", type=int, default=Plan.disk_gb, help="size of each encrypted root disk")
    add("--ami", help="image of both instances instead of Debian 13")
    add("--subnet", help="subnet of the instances instead of the default one")
    add("--open-to-the-world", action="store_true", help="accept ranges such as 0.0.0.0/0")
    add("--dry-run", action="store_true", help="only look, and say what would be done")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 all as planned, 1 AWS refused or holds something unexpected."""
    arguments = _parser().parse_args(argv)

    def report(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    try:
        plan = Plan(
            name=arguments.name,
            admin_cidrs=tuple(arguments.admin_cidr),
            trigger_cidrs=tuple(arguments.trigger_cidr),
            client_cidrs=tuple(arguments.client_cidr),
            client_ports=tuple(arguments.client_port or (8000, 8001, 8080)),
            key_name=arguments.key_name,
            jenkins_type=arguments.jenkins_type,
            application_type=arguments.application_type,
            disk_gb=arguments.disk_gb,
            ami=arguments.ami,
            subnet=arguments.subnet,
            allow_world=arguments.open_to_the_world,
        )
        Provisioner(plan, dry_run=arguments.dry_run, report=report).run()
    except (ProvisionError, ClientError, BotoCoreError) as error:
        sys.stderr.write(f"provision: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
