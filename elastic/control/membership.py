"""Who is there: members by what they are doing, in the order they came. Pure bookkeeping.

Every change costs the same however many members there are, but for those of the world, which cost its size.
"""

from collections.abc import Collection, Iterable, KeysView, Mapping
from dataclasses import dataclass, field

from elastic.control.events import MemberReady
from elastic.control.standing import BLANK

_UNKNOWN = (BLANK, 0)  # the step and the world of who has said nothing


@dataclass(slots=True)
class Membership:
    """Members that are starting, members that are ready (with their hosts), and the world's members in rank
    order.

    Member names are never reused, so a lost one that speaks again is known to be a stranger.
    """

    prefix: str
    hosts: dict[str, str] = field(default_factory=dict)
    world: tuple[str, ...] = ()
    num_named: int = 0
    _starting: dict[str, float] = field(default_factory=dict)
    _outside: dict[str, None] = field(default_factory=dict)
    _ranked: frozenset[str] = frozenset()
    _leaving: dict[str, str] = field(default_factory=dict)
    _veterans: dict[str, None] = field(default_factory=dict)
    _heirs: dict[str, None] = field(default_factory=dict)
    _num_settled: int = 0
    _spread: dict[frozenset[str], None] = field(default_factory=dict)
    _givers: tuple[str, ...] = ()  # they keep what they gave until the next world settles
    _is_lost: bool = False
    _is_safe: bool = False
    _found: dict[str, tuple[int, int]] = field(default_factory=dict)
    _missing: set[str] = field(default_factory=set)
    _has_greeted: bool = False  # one of them
    _gone: set[str] = field(default_factory=set)

    def expect(self, members: Iterable[str], until: float) -> None:
        """Count an earlier driver's members as starting."""
        self._found = dict.fromkeys(members, _UNKNOWN)
        self._missing = set(self._found)
        self._starting.update(dict.fromkeys(self._found, until))

    def hasten(self, until: float) -> None:
        """Give an earlier driver's members that have not answered yet no longer than this."""
        self._starting.update({one: min(until, self._starting[one]) for one in self._missing})

    def name_next(self, until: float) -> str:
        """Name a member that is about to start, and has to be ready by then."""
        while self.knows(member := f"{self.prefix}{self.num_named}") or member in self._gone:
            self.num_named += 1  # an earlier driver that claimed nothing yet used the same prefix
        self.num_named += 1
        self._starting[member] = until
        return member

    def admit(self, ready: MemberReady) -> bool:
        """Count a member as ready, also one that another driver started, but none that was dropped; return
        whether it has been in no world, and this controller hears of it for the first time.
        """
        member = ready.member
        if member in self._gone:
            return False
        if (ready.step, ready.generation) == _UNKNOWN:
            self._found.pop(member, None)
        is_new = self._starting.pop(member, None) is not None and member not in self._found
        if member in self._found:
            self._found[member] = max((ready.step, ready.generation), self._found[member])
        self._greet(member)
        self.hosts[member] = ready.host
        if member not in self._ranked and member not in self._leaving:
            self._outside[member] = None
        return is_new

    def build(self, member: str, until: float) -> None:
        """Count an earlier driver's member as one that is about to be ready, and holds nothing."""
        if member in self._missing:
            self._greet(member)
            self._found.pop(member, None)
            self._starting[member] = until

    def _greet(self, member: str) -> None:
        self._has_greeted = self._has_greeted or member in self._missing
        self._missing.discard(member)

    def part(self, member: str, why: str) -> None:
        """Count a member as leaving: it keeps its rank until a world without it forms, and gets no other."""
        self._leaving[member] = why
        self._outside.pop(member, None)

    def knows(self, member: str) -> bool:
        """Say whether this member is starting or ready."""
        return member in self.hosts or member in self._starting

    def drop(self, member: str) -> bool:
        """Forget a lost member; the world keeps the others in their order. Return whether it was starting."""
        was_starting = self._starting.pop(member, None) is not None
        self._gone.add(member)
        self._outside.pop(member, None)
        self._leaving.pop(member, None)
        self._veterans.pop(member, None)
        self._found.pop(member, None)
        self._missing.discard(member)
        self.hosts.pop(member, None)
        self._disinherit(member)
        if member in self._ranked:
            self.world = tuple(other for other in self.world if other != member)
            self._ranked -= {member}
        return was_starting

    def _disinherit(self, member: str) -> None:
        """Count a lost member out of the heirs; the last one's are those who gave them what they held."""
        was_heir = member in self._heirs
        self._heirs.pop(member, None)
        if was_heir and not self._heirs and self._givers:
            self._heirs = {one: None for one in self._givers if one in self.hosts}
            self._spread[frozenset(self._givers)] = None

    def rank(self, members: tuple[str, ...]) -> None:
        """Make ready members the world, in this order of ranks."""
        self.world, self._ranked, self._is_safe = members, frozenset(members), False
        self._spread[self._ranked] = None
        self._veterans.update(dict.fromkeys(members))
        self._find_outside()

    def _find_outside(self) -> None:
        others = (one for one in self.hosts if one not in self._ranked and one not in self._leaving)
        self._outside = dict.fromkeys(others)

    def settle(self, leaving: Collection[str] = ()) -> bool:
        """Note that all of the world hold the newest state, but for those who have given theirs away; return
        whether somebody did not before.
        """
        is_larger = not self._ranked <= self.holders
        self._heirs, self._found = {one: None for one in self.world if one not in leaving}, {}
        self._num_settled, self._is_lost = len(self._heirs), False
        self._spread = {frozenset(self._heirs): None}
        self._givers = self.world if leaving else ()
        return is_larger

    def blank(self, member: str) -> bool:
        """Count a member as one that holds nothing; return whether it held the newest state until then.

        What the others hold of it may be no more use: the next world restores one, as far as is known.
        """
        if member not in self._heirs:
            return False
        del self._heirs[member]
        self._is_lost = True
        return True

    def disband(self) -> None:
        """Leave nobody in the world: it ended in good order, and what it held is durable."""
        self.world, self._ranked, self._is_safe = (), frozenset(), True
        self._find_outside()

    def drop_overdue(self, now: float) -> tuple[str, ...]:
        """Forget those that should have been ready by now, and name them."""
        overdue = tuple(member for member, until in self._starting.items() if now > until)
        for member in overdue:
            self.drop(member)
        return overdue

    @property
    def heirs(self) -> tuple[str, ...]:
        """Who holds the newest state: what is left of the world that settled last, wherever they are now."""
        return tuple(self._heirs)

    @property
    def holders(self) -> frozenset[str]:
        """Who is known to hold the newest state, or may."""
        return frozenset(self.heirs or self.found)

    @property
    def is_held(self) -> bool:
        """Whether anybody is known to hold the newest state, or may."""
        return bool(self.holders or self._missing)

    @property
    def is_safe(self) -> bool:
        """Whether what the members hold is durable, and no world has gone on from there."""
        return self._is_safe

    @property
    def needed(self) -> Collection[str]:
        """Who may not be ended, as it holds the newest state; where that is safe, who leaves may."""
        heirs = self._heirs.keys()
        return heirs - self._leaving.keys() if self._is_safe else heirs

    @property
    def found(self) -> tuple[str, ...]:
        """An earlier driver's ready members, while no world has settled yet: they may hold the state. Who
        holds the newest, as far as they have said, comes first; of several, who was in a later world.
        """
        newest_first = sorted(self._found, key=self._found.__getitem__, reverse=True)
        return tuple(member for member in newest_first if member in self.hosts)

    def may_hold(self, member: str) -> bool:
        """Whether this member holds the newest state, as far as is known."""
        return member in self._heirs or member in self._found

    def is_last_holder(self, member: str) -> bool:
        """Whether nobody else is known to hold as new a state as this member."""
        if self._heirs:
            return self._heirs.keys() == {member}
        step, _ = self._found.get(member, _UNKNOWN)
        others = [self._found[one][0] for one in self.found if one != member]
        return step > max(others, default=BLANK)

    @property
    def is_missing_all(self) -> bool:
        """Whether none of an earlier driver's members has answered yet."""
        return bool(self._missing) and not self._has_greeted

    @property
    def missing(self) -> Collection[str]:
        """The members of an earlier driver that have not answered yet."""
        return self._missing

    @property
    def spreads(self) -> Collection[frozenset[str]]:
        """Over whom the newest state may be spread: the world that settled last, as it was, or one ordered
        since, of which nobody may have told yet how far it came.
        """
        return self._spread.keys()

    def savers(self, copies: int) -> tuple[str, ...]:
        """Who saves the newest state: who is known to hold it, or may; of one in shards, of which there are
        `copies`, whoever may have some.
        """
        known = self.heirs or self.found or self.world
        spread = frozenset().union(*self._spread) if copies else frozenset()
        return (*known, *(one for one in self.hosts if one in spread and one not in known))

    @property
    def has_state(self) -> bool:
        """Whether somebody is known to hold the newest state."""
        return bool(self._heirs)

    @property
    def has_heir(self) -> bool:
        """Whether the world has a member that holds the newest state and stays; or nobody holds it."""
        return not self._heirs or any(
            member in self._ranked and member not in self._leaving for member in self._heirs
        )

    def is_ranked(self, member: str) -> bool:
        """Say whether this member is in the world."""
        return member in self._ranked

    @property
    def staying(self) -> tuple[str, ...]:
        """The world's members that are not leaving, in rank order."""
        if not self._leaving:
            return self.world
        return tuple(member for member in self.world if member not in self._leaving)

    @property
    def leaving(self) -> Mapping[str, str]:
        """The members that are leaving, and why."""
        return self._leaving

    @property
    def left_behind(self) -> tuple[str, ...]:
        """The members outside the world that have been in one: what they hold is old. None, if no world is
        there.
        """
        if not self.world or len(self._veterans) == len(self.world):
            return ()
        return tuple(member for member in self._veterans if member not in self._ranked)

    @property
    def num_lasting(self) -> int:
        """How many members are there or on their way, and not leaving."""
        return len(self.hosts) + len(self._starting) - len(self._leaving)

    @property
    def origin(self) -> str:
        """Where the world's members get the state that they may lack."""
        if self._is_lost or self._ranked.isdisjoint(self._heirs):
            return "store"
        if not self._ranked <= self._heirs.keys():
            return "peer"
        return "self" if len(self._ranked) == self._num_settled else "survivors"

    @property
    def is_deserted(self) -> bool:
        """Whether all that are ready are leaving."""
        return bool(self._leaving) and len(self.hosts) == len(self._leaving.keys() & self.hosts.keys())

    @property
    def starting(self) -> KeysView[str]:
        """The members that are starting."""
        return self._starting.keys()

    @property
    def outside(self) -> KeysView[str]:
        """The ready members that are not in the world."""
        return self._outside.keys()
