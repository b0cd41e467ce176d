"""Whether the tokens and document lengths of a shard are possible ones: what no checksum can tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest, token_dtype
from .member_index import LENGTH, Member, document_starts


@dataclass(frozen=True, slots=True)
class Fault:
    """A member that holds what preparation never writes."""

    span: range
    """Its bytes in the shard."""
    sentence: str


class ContentCheck:
    """Looks at the members of one shard in order, and counts their documents.

    ``begins_chunk`` says that nothing precedes the shard which a document of it could continue.
    """

    def __init__(self, manifest: Manifest, *, begins_chunk: bool) -> None:
        self._dtype = token_dtype(manifest.dtype)
        self._vocabulary_size = manifest.vocabulary_size
        self._end_of_document = manifest.eos_id
        self._may_continue = not begins_chunk
        self._must_continue = False
        self.documents = 0
        self.faults: list[Fault] = []

    def add(self, member: Member, tokens: bytes, lengths: bytes) -> None:
        """Look at the payloads of the next member; at most one fault of it is kept."""
        ids = np.frombuffer(tokens, self._dtype)
        pieces = np.frombuffer(lengths, LENGTH)
        fault = self._lengths_fault(member, pieces) or self._tokens_fault(member, ids, pieces)
        if fault is not None:
            self.faults.append(fault)
        self.documents += document_starts(pieces).size
        self._may_continue = True
        self._must_continue = int(ids[-1]) != self._end_of_document

    def _lengths_fault(self, member: Member, lengths: NDArray[np.uint32]) -> Fault | None:
        span = range(member.lengths_offset, member.lengths_offset + lengths.nbytes)
        continues = bool(lengths[0] == 0)
        total = int(lengths.sum(dtype=np.int64))
        if total != member.tokens:
            return Fault(span, f"the document lengths add up to {total} and the member has {member.tokens} tokens")
        if not lengths[1:].all():
            return Fault(span, "a document has the length 0")
        if continues and not self._may_continue:
            return Fault(span, "the first document continues one that is not there")
        if self._must_continue and not continues:
            return Fault(span, "a document begins before the end of the preceding one")
        return None

    def _tokens_fault(
        self, member: Member, ids: NDArray[np.unsignedinteger], lengths: NDArray[np.uint32]
    ) -> Fault | None:
        if int(ids.max()) >= self._vocabulary_size:
            first = int(np.argmax(ids >= self._vocabulary_size))
            return self._token_fault(
                member, first, f"token id {ids[first]} is beyond the vocabulary of {self._vocabulary_size}"
            )
        # The end of the last piece is judged with the next member, which may continue it.
        ends = np.cumsum(lengths[lengths > 0], dtype=np.int64)[:-1] - 1
        wrong = ends[ids[ends] != self._end_of_document]
        if wrong.size:
            first = int(wrong[0])
            return self._token_fault(
                member, first, f"a document ends with token id {ids[first]} and not with {self._end_of_document}"
            )
        return None

    def _token_fault(self, member: Member, position: int, sentence: str) -> Fault:
        start = member.offset + position * self._dtype.itemsize
        return Fault(range(start, start + self._dtype.itemsize), sentence)
