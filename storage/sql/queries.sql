-- The store's queries, one a name. `given` is a table of bulk values that the caller registers.

-- rows ----------------------------------------------------------------------------------------

-- name: insert_rows
INSERT INTO rows BY NAME SELECT * FROM given;

-- name: last_row
SELECT coalesce(max(seq), 0) FROM rows;

-- name: insert_quarantine
INSERT INTO quarantine BY NAME SELECT * FROM given ANTI JOIN erased USING (hash) ON CONFLICT DO NOTHING;

-- name: quarantined
SELECT * FROM quarantine WHERE $reason IS NULL OR reason = $reason ORDER BY "at" DESC, hash LIMIT $limit;

-- name: quarantine_counts
SELECT reason, count(*) FROM quarantine GROUP BY reason ORDER BY reason;

-- name: rows_given
SELECT rows.* FROM rows JOIN given USING (hash);

-- name: told_given
SELECT rows.key, labels.id, labels.row_hash, labels.created_at
FROM labels JOIN rows ON rows.hash = labels.row_hash
WHERE labels.source = $source AND labels.id IN (SELECT hash FROM given)
QUALIFY labels.seq = max(labels.seq) OVER (PARTITION BY rows.key, labels.id);

-- name: answers_given
SELECT rows.key, rows.hash, rows.answer, rows.id, rows.source, max(labels.created_at) AS created_at,
    rows.hash NOT IN (SELECT row_hash FROM superseded) AS counts
FROM rows JOIN labels ON labels.row_hash = rows.hash
WHERE rows.key IN (SELECT hash FROM given)
GROUP BY ALL ORDER BY rows.key, min(rows.seq);

-- name: put_labels
MERGE INTO labels USING (
    SELECT row_hash, source, id, created_at, seq + (SELECT coalesce(max(seq), 0) FROM labels) AS seq FROM given
) AS told ON labels.row_hash = told.row_hash AND labels.source = told.source AND labels.id = told.id
WHEN MATCHED THEN UPDATE SET created_at = greatest(labels.created_at, told.created_at), seq = told.seq
WHEN NOT MATCHED THEN INSERT (row_hash, source, id, created_at, seq)
    VALUES (told.row_hash, told.source, told.id, told.created_at, told.seq);

-- name: insert_supersessions
INSERT INTO supersessions
SELECT seq + (SELECT coalesce(max(seq), 0) FROM supersessions), row_hash, by_hash, "at" FROM given;

-- name: supersessions
SELECT * FROM supersessions ORDER BY seq;

-- name: superseded_given
SELECT row_hash FROM superseded WHERE row_hash IN (SELECT hash FROM given);

-- name: superseded_count
SELECT count(*) FROM superseded;

-- name: splits_given
SELECT DISTINCT question_key, split FROM rows WHERE question_key IN (SELECT hash FROM given);

-- name: words_given
SELECT words_key, arg_max(split, (split = 'suite', -seq)), arg_max(id, (split = 'suite', -seq)) FROM rows
WHERE words_key IN (SELECT hash FROM given) GROUP BY words_key;

-- name: wordless
SELECT DISTINCT question_key, context, question FROM rows WHERE words_key IS NULL;

-- name: set_words
UPDATE rows SET words_key = given.words_key FROM given
WHERE rows.question_key = given.question_key AND rows.words_key IS NULL;

-- name: row_counts
SELECT task, split, count(*) FROM standing GROUP BY task, split ORDER BY task, split;

-- name: task_rows
SELECT * FROM standing WHERE task = $task AND split = $split ORDER BY seq;

-- name: pending
SELECT * FROM standing
WHERE split = $split AND hash NOT IN (SELECT hash FROM learned($split, $lineage))
ORDER BY seq;

-- name: pending_count
SELECT count(*) FROM standing
WHERE split = $split AND hash NOT IN (SELECT hash FROM learned($split, $lineage));

-- name: task_names
SELECT DISTINCT task FROM rows ORDER BY task;

-- name: answer_shape
SELECT count(*), count(DISTINCT answer), coalesce(max(len(regexp_split_to_array(trim(answer), '\s+'))), 0)
FROM standing WHERE task = $task AND split = 'train';

-- name: answers
SELECT DISTINCT answer  -- one that is never taught is no choice
FROM standing WHERE task = $task AND split = 'train' ORDER BY answer;

-- name: cursor
SELECT watermark, full_scan_at, pulled_at FROM cursors WHERE source = $source;

-- name: save_cursor
INSERT INTO cursors VALUES ($source, $watermark, $full_scan_at, $pulled_at)
ON CONFLICT (source) DO UPDATE SET
    watermark = excluded.watermark, full_scan_at = excluded.full_scan_at, pulled_at = excluded.pulled_at;

-- tasks and suites ----------------------------------------------------------------------------

-- name: tasks
SELECT * FROM tasks ORDER BY created_at, name;

-- name: put_task
INSERT INTO tasks VALUES ($name, $kind, $metric, $origin, $labels, $created_at)
ON CONFLICT (name) DO UPDATE SET
    kind = excluded.kind, metric = excluded.metric, origin = excluded.origin, labels = excluded.labels;

-- name: suites
SELECT * FROM suites ORDER BY task, version;

-- name: suite
SELECT * FROM suites WHERE task = $task AND version = $version;

-- name: latest_suite
SELECT * FROM suites WHERE task = $task ORDER BY version DESC LIMIT 1;

-- name: latest_suites
FROM (SELECT * FROM suites QUALIFY version = max(version) OVER (PARTITION BY task)) AS latest
WHERE EXISTS (  -- not when all of its rows were erased
    SELECT 1 FROM suite_rows JOIN rows ON rows.hash = suite_rows.row_hash
    WHERE suite_rows.task = latest.task AND suite_rows.version = latest.version
)
ORDER BY task;

-- name: insert_suite
INSERT INTO suites VALUES ($task, $version, $hash, $size, $frozen_at, $cycle_id);

-- name: insert_suite_rows
INSERT INTO suite_rows SELECT $task, $version, hash FROM given;

-- name: strangers_given
SELECT given.hash FROM given ANTI JOIN (
    SELECT hash FROM standing WHERE task = $task AND split = 'suite'
) AS suite USING (hash);

-- name: suite_rows
SELECT rows.* FROM suite_rows JOIN rows ON rows.hash = suite_rows.row_hash
WHERE suite_rows.task = $task AND suite_rows.version = $version
ORDER BY rows.hash;

-- cycles --------------------------------------------------------------------------------------

-- name: insert_cycle
INSERT INTO cycles (id, state, trigger, requested_by, requested_at)
SELECT coalesce(max(id), 0) + 1, 'requested', $trigger, $requested_by, $now FROM cycles
RETURNING *;

-- name: cycle
SELECT * FROM cycles WHERE id = $id;

-- name: unfinished
SELECT * FROM cycles WHERE finished_at IS NULL ORDER BY id;

-- name: cycles
SELECT * FROM cycles ORDER BY id DESC LIMIT $limit;

-- name: last_ended
SELECT * FROM cycles WHERE finished_at IS NOT NULL ORDER BY finished_at DESC, id DESC LIMIT 1;

-- name: cycles_with
SELECT * FROM cycles WHERE snapshot = $snapshot ORDER BY id DESC;

-- name: update_cycle
UPDATE cycles SET
    state = $state, trigger = $trigger, requested_by = $requested_by, requested_at = $requested_at,
    started_at = $started_at, finished_at = $finished_at, parent = $parent, snapshot = $snapshot,
    version = $version, reason = $reason, attempts = $attempts
WHERE id = $id;

-- name: count_attempt
UPDATE cycles SET attempts = attempts + 1 WHERE id = $id RETURNING attempts;

-- name: insert_cycle_rows
INSERT INTO cycle_rows SELECT $cycle_id, hash, role FROM given ON CONFLICT DO NOTHING;

-- name: cycle_rows
SELECT row_hash FROM cycle_rows
WHERE cycle_id = $cycle_id AND ($role IS NULL OR role = $role)
ORDER BY role, row_hash;

-- name: first_learned
SELECT rows.task, min(cycle_rows.cycle_id) FROM cycle_rows JOIN rows ON rows.hash = cycle_rows.row_hash
WHERE cycle_rows.role = 'train' AND cycle_rows.cycle_id IN (SELECT unnest($lineage::BIGINT[]))
GROUP BY rows.task;

-- name: insert_verdict
INSERT INTO verdicts VALUES ($cycle_id, $passed, $verdict, $now);

-- name: verdict
SELECT passed, verdict FROM verdicts WHERE cycle_id = $cycle_id;

-- name: put_candidate
INSERT INTO candidates VALUES ($cycle_id, $number, $kind, $source, $result, $strategy, $change, $share,
    $curve, $model, $passed, $verdict, $note, $created_at)
ON CONFLICT (cycle_id, number) DO UPDATE SET
    result = excluded.result, strategy = excluded.strategy, change = excluded.change, share = excluded.share,
    curve = excluded.curve, model = excluded.model, passed = excluded.passed, verdict = excluded.verdict,
    note = excluded.note;

-- name: candidates
SELECT * FROM candidates WHERE cycle_id = $cycle_id ORDER BY number;

-- models and promotions -----------------------------------------------------------------------

-- name: insert_model
INSERT INTO models VALUES ($version, $cycle_id, $parent, $result, $adapter_hash, $base, $created_at);

-- name: model
SELECT * FROM models WHERE version = $version;

-- name: model_of_cycle
SELECT * FROM models WHERE cycle_id = $cycle_id;

-- name: models
SELECT * FROM models ORDER BY version;

-- name: promotions
SELECT * FROM promotions ORDER BY seq;

-- name: champion
SELECT * FROM promotions ORDER BY seq DESC LIMIT 1;

-- name: insert_promotion
INSERT INTO promotions
SELECT coalesce(max(seq), 0) + 1, $version, $previous, $cycle_id, $kind, $who, $why, $now FROM promotions
RETURNING *;

-- evaluation ----------------------------------------------------------------------------------

-- name: insert_predictions
INSERT INTO predictions
SELECT $model, $exam, row_hash, prediction, exact_match, token_f1, score
FROM given ANTI JOIN erased ON erased.hash = given.row_hash  -- erased while the exam was sat
ON CONFLICT DO NOTHING;

-- name: predictions
SELECT row_hash, prediction, exact_match, token_f1, score FROM predictions
WHERE model = $model AND exam = $exam ORDER BY row_hash;

-- name: put_scores
INSERT OR REPLACE INTO scores BY NAME SELECT * FROM given;

-- name: scores
SELECT * FROM scores WHERE $cycle_id IS NULL OR cycle_id = $cycle_id ORDER BY cycle_id, label, task;

-- name: comparable_scores
WITH sat AS (
    SELECT DISTINCT ON (model, task) model, task, exam FROM scores
    WHERE cycle_id <= $upto ORDER BY model, task, cycle_id DESC
), kept AS (  -- rows of each newest suite version, and since which version they were in it without a gap
    SELECT task, row_hash, min(version) AS since FROM (
        SELECT task, suite_rows.row_hash, version FROM suite_rows JOIN suites USING (task, version)
        ANTI JOIN erased ON erased.hash = suite_rows.row_hash
        WHERE suites.cycle_id <= $upto
        QUALIFY max(version) OVER (PARTITION BY task) - version
            = row_number() OVER (PARTITION BY task, suite_rows.row_hash ORDER BY version DESC) - 1
    ) GROUP BY task, row_hash
), compared AS (
    SELECT task, row_hash FROM kept QUALIFY since = min(since) OVER (PARTITION BY task)
)
SELECT sat.model, sat.task, avg(predictions.score) FROM sat
JOIN compared USING (task)
JOIN predictions ON predictions.model = sat.model AND predictions.exam = sat.exam
    AND predictions.row_hash = compared.row_hash
GROUP BY sat.model, sat.task;

-- name: is_cancelled
SELECT count(*) > 0 FROM events WHERE cycle_id = $cycle_id AND kind = 'cancel';

-- events and meta -----------------------------------------------------------------------------

-- name: insert_event
INSERT INTO events SELECT coalesce(max(seq), 0) + 1, $now, $kind, $cycle_id, $detail FROM events;

-- name: events
SELECT * FROM events
WHERE ($cycle_id IS NULL OR cycle_id = $cycle_id) AND ($kind IS NULL OR kind = $kind)
ORDER BY seq DESC LIMIT $limit;

-- name: get_meta
SELECT value FROM meta WHERE key = $key;

-- name: set_meta
INSERT INTO meta VALUES ($key, $value) ON CONFLICT (key) DO UPDATE SET value = excluded.value;
