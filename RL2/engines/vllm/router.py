"""Which server a request goes to."""

from __future__ import annotations


class Router:
    """Requests with the same prompt, and what goes on from it, stay on one server; another prompt goes where the fewest
    tokens are outstanding.

    So the members of a group share the cache of their prompt, and a second turn finds its first.
    """

    def __init__(self, num_servers: int) -> None:
        self.outstanding = [0] * num_servers
        """Tokens that each server has yet to read and may yet sample."""
        self.homes: dict[int, dict[int, int]] = {}
        """Length of a prompt -> hash of its tokens -> server."""

    def choose(self, token_ids: list[int], tokens: int, avoid: frozenset[int] = frozenset()) -> int:
        """The server of a request of `tokens` tokens in all, none of `avoid`; until `release` they are outstanding."""
        server = self._home(token_ids)
        if server is None or server in avoid:
            server = min((i for i in range(len(self.outstanding)) if i not in avoid), key=self.outstanding.__getitem__)
            self.homes.setdefault(len(token_ids), {})[hash(tuple(token_ids))] = server
        self.outstanding[server] += tokens
        return server

    def _home(self, token_ids: list[int]) -> int | None:
        """Of the longest prompt that these tokens begin with."""
        for length in sorted((n for n in self.homes if n <= len(token_ids)), reverse=True):
            if (server := self.homes[length].get(hash(tuple(token_ids[:length])))) is not None:
                return server
        return None

    def release(self, server: int, tokens: int) -> None:
        self.outstanding[server] -= tokens

    def forget(self) -> None:
        """New weights: no server has anything in its cache."""
        self.homes.clear()
