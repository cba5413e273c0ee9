-- The candidates of a cycle: the first is the plain training, each further one an attempt to rescue it.
-- (`cycles.attempts` is something else: how often the cycle's worker died.)
CREATE TABLE candidates (
    cycle_id   BIGINT NOT NULL,
    number     INTEGER NOT NULL,                -- from 1
    kind       TEXT NOT NULL CHECK (kind IN ('train', 'blend', 'protect')),
    source     INTEGER,                         -- number of the candidate that it starts from
    result     TEXT NOT NULL,                   -- result directory, relative to the state directory
    strategy   TEXT,                            -- JSON; NULL: the one in the snapshot
    change     TEXT,                            -- protect: what was turned up, in words
    share      DOUBLE,                          -- blend: how far from the champion to its source
    curve      TEXT,                            -- blend: JSON of the scores on validation rows
    model      TEXT,                            -- SHA-256 of its adapter; NULL: not made
    passed     BOOLEAN,                         -- NULL: not judged
    verdict    TEXT,                            -- JSON, as in verdicts
    note       TEXT,                            -- why it was set aside, in words
    created_at TIMESTAMP NOT NULL,
    PRIMARY KEY (cycle_id, number)
);

INSERT INTO candidates
SELECT cycles.id, 1, 'train', NULL, 'cycles/' || cycles.id || '/train', NULL, NULL, NULL, NULL, models.adapter_hash,
    verdicts.passed, verdicts.verdict, NULL, coalesce(cycles.started_at, cycles.requested_at)
FROM cycles
LEFT JOIN models ON models.cycle_id = cycles.id
LEFT JOIN verdicts ON verdicts.cycle_id = cycles.id
WHERE cycles.snapshot IS NOT NULL;
