"""The users of one request: its tensors are flat, and say by lengths which values are whose.

A request of one user needs no lengths. One of several users has a value of `user_id` for each. Its lists are
ragged: `candidate.lengths` and `behavior.lengths` say how many candidates and behaviors each user has, and
`<feature>.lengths` how many values a further list of the request has. A list with the shape (users, n) has n
for each and needs no lengths.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mim_torchrec.data.features import Ids, Numbers
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.inputs import LENGTHS, Input
from mim_torchrec.serving.lookups import ROLES
from mim_torchrec.serving.messages import BadRequest, ScoreRequest


def requests_of(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    known: Mapping[str, Input],
    limits: Limits,
    *,
    contribution: bool = False,
    explain: bool = False,
) -> list[ScoreRequest]:
    """The requests of all users, in their order.

    Args:
        tensors: by name, flat.
        shapes: of the tensors, as they were sent.
        known: inputs of the model.
        limits: of a request, whatever its number of users.
        contribution: whether to say what content interest contributed.
        explain: whether to say what every interest and every behavior contributed.

    Raises:
        BadRequest: lengths are missing or do not fit, or there is too much or too little.
    """
    users = tensors["user_id"].numel()
    if not users:
        raise BadRequest("user_id has no value: a request has one user or several")
    if users > limits.max_users:
        raise BadRequest(f"{users} users are more than {limits.max_users}")
    sizes = {role: tensors[f"{role}_item_id"].numel() for role in ROLES}
    if not sizes["candidate"]:
        raise BadRequest("there is no candidate")
    for role, most in (("candidate", limits.max_candidates), ("behavior", limits.max_behaviors)):
        if sizes[role] > most:
            raise BadRequest(f"{sizes[role]} {role}s are more than {most}")
    given = {name: values for name, values in tensors.items() if not name.endswith(LENGTHS)}
    if without := [name for name in tensors if name.endswith(LENGTHS) and not _has_lists(name, given)]:
        raise BadRequest(f"the tensor {without[0]} is there without the list that it is of")
    lengths: dict[str, list[int]] = {
        role: _lengths(role, f"{role}_item_id", users, tensors, shapes) for role in ROLES
    }
    if 0 in lengths["candidate"]:
        raise BadRequest(f"the user at {lengths['candidate'].index(0)} has no candidate")
    parts: dict[str, Sequence[Tensor]] = {}
    for name, values in given.items():
        if known[name].is_list:
            own = _lengths(name, name, users, tensors, shapes)
        else:
            own = lengths.get(known[name].owner, [1] * users)
        if values.numel() != sum(own):
            raise BadRequest(f"the tensor {name} has {values.numel()} values, expected {sum(own)}")
        if known[name].is_list or known[name].owner in ROLES:
            _check_shape(name, shapes[name], own)
        parts[name] = values.split(own)
    found = []
    for user in range(users):
        of_user = {name: part[user] for name, part in parts.items()}
        times, moment = of_user.pop("behavior_ts", None), of_user.pop("request_ts", None)
        if times is not None and moment is not None and bool((times > moment).any()):
            raise BadRequest(
                "a behavior is after its request" + (f", of the user at {user}" if users > 1 else "")
            )
        found.append(
            ScoreRequest(
                ids={name: values for name, values in of_user.items() if isinstance(known[name].kind, Ids)},
                dense={
                    name: values for name, values in of_user.items() if isinstance(known[name].kind, Numbers)
                },
                request_ts=None if moment is None else int(moment),
                behavior_ts=times,
                contribution=contribution,
                explain=explain,
            )
        )
    return found


def _has_lists(name: str, given: Mapping[str, Tensor]) -> bool:
    of = name.removesuffix(LENGTHS)
    return of in given or of in ROLES


def _lengths(
    of: str, counted: str, users: int, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> list[int]:
    """How many values each user has: by the lengths that were sent, or by the shape of a list."""
    name, count = of + LENGTHS, tensors[counted].numel()
    said: Tensor | None = tensors.get(name)
    if said is not None:
        lengths: list[int] = said.tolist()
        if len(lengths) != users:
            raise BadRequest(f"the tensor {name} has {len(lengths)} values, and user_id has {users}")
        if min(lengths) < 0:
            raise BadRequest(f"the tensor {name} has the value {min(lengths)}: a length is at least 0")
        if sum(lengths) != count:
            raise BadRequest(f"the values of {name} add up to {sum(lengths)}, and {counted} has {count}")
        return lengths
    if users == 1:
        return [count]
    shape = shapes[counted]
    if len(shape) == 2 and shape[0] == users:
        return [shape[1]] * users
    raise BadRequest(
        f"user_id has {users} values, and the tensor {name} is missing: send how many values of {counted} "
        f"each user has, or {counted} in the shape [{users}, n]"
    )


def _check_shape(name: str, shape: Sequence[int], lengths: Sequence[int]) -> None:
    """See that rows of a tensor, if it has several, are those of the users."""
    users = len(lengths)
    if users == 1 or len(shape) == 1 or shape[0] == 1:
        return
    if shape[0] != users or set(lengths) != {shape[1]}:
        raise BadRequest(
            f"the tensor {name} has the shape {list(shape)}, and users have {_said(lengths)} values"
        )


def _said(lengths: Sequence[int]) -> str:
    """The lengths, or the first of them.

    >>> _said([3, 4]), _said(range(12))
    ('3, 4', '0, 1, 2, 3, 4, 5, 6, 7, …')
    """
    first = ", ".join(map(str, lengths[:8]))
    return first if len(lengths) <= 8 else f"{first}, …"
