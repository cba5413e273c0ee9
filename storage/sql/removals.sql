-- What is removed on purpose.

-- name: pruned
SELECT * FROM pruned ORDER BY path;

-- name: insert_pruned
INSERT INTO pruned VALUES ($path, $why, $now, $done) ON CONFLICT DO NOTHING;

-- name: pruned_done
UPDATE pruned SET done = true WHERE path = $path;

-- name: unprune
DELETE FROM pruned WHERE path = $path;

-- name: delete_answers
DELETE FROM predictions WHERE model = $model;

-- name: delete_answers_given
DELETE FROM predictions WHERE exam IN (SELECT hash FROM given);

-- name: chosen_rows
SELECT * FROM rows
WHERE seq >= $seq AND (seq > $seq OR hash > $last)
    AND ($row IS NULL OR hash = $row OR id = $row OR hash IN (SELECT row_hash FROM labels WHERE id = $row))
    AND ($source IS NULL OR source = $source)
    AND ($before IS NULL OR coalesce(created_at, accepted_at) < $before)
ORDER BY seq, hash LIMIT $limit;

-- name: insert_erasure
INSERT INTO erasures
SELECT coalesce(max(id), 0) + 1, $who, $why, $now, $rebuild, NULL FROM erasures
RETURNING *;

-- name: erasures
SELECT * FROM erasures ORDER BY id;

-- name: erasure_done
UPDATE erasures SET done_at = $now WHERE id = $id;

-- name: insert_erased
INSERT INTO erased SELECT hash, $erasure FROM given ON CONFLICT DO NOTHING;

-- name: erased
SELECT hash FROM erased;

-- name: erased_given
SELECT hash FROM erased JOIN given USING (hash);

-- name: insert_tainted
INSERT INTO tainted VALUES ($version, $erasure) ON CONFLICT DO NOTHING;

-- name: tainted
SELECT version FROM tainted ORDER BY version;

-- name: taught
SELECT DISTINCT cycle_id FROM cycle_rows JOIN erased ON erased.hash = cycle_rows.row_hash ORDER BY cycle_id;

-- name: taught_given
SELECT DISTINCT cycle_id FROM cycle_rows JOIN given ON given.hash = cycle_rows.row_hash ORDER BY cycle_id;

-- name: suites_lacking
SELECT DISTINCT task, version FROM suite_rows JOIN erased ON erased.hash = suite_rows.row_hash ORDER BY ALL;

-- name: lacking
SELECT count(*) FROM suite_rows JOIN erased ON erased.hash = suite_rows.row_hash
WHERE task = $task AND version = $version;

-- name: erase_quarantine
DELETE FROM quarantine WHERE hash IN (SELECT hash FROM erased);

-- name: erase_labels
DELETE FROM labels WHERE row_hash IN (SELECT hash FROM erased);

-- name: erase_predictions
DELETE FROM predictions WHERE row_hash IN (SELECT hash FROM erased);

-- name: veil_predictions
UPDATE predictions SET prediction = '(erased)'
WHERE prediction IN (SELECT answer FROM rows WHERE hash IN (SELECT hash FROM erased))
    AND prediction NOT IN (SELECT answer FROM rows WHERE hash NOT IN (SELECT hash FROM erased));

-- name: heir_supersessions
UPDATE supersessions SET by_hash = heir.hash FROM (
    SELECT lost.hash AS lost, standing.hash FROM rows AS lost JOIN standing USING (key)
    WHERE standing.hash NOT IN (SELECT hash FROM erased)
    QUALIFY standing.seq = max(standing.seq) OVER (PARTITION BY lost.hash)
) AS heir
WHERE supersessions.row_hash = heir.lost AND supersessions.by_hash IN (SELECT hash FROM erased);

-- name: last_supersessions
-- Where no answer is left that counts, the one that fell last counts again, and has taken the others' place.
UPDATE supersessions SET by_hash = heirs.hash FROM (
    WITH fallen AS (
        SELECT rows.hash, rows.key, superseded.seq FROM superseded JOIN rows ON rows.hash = superseded.row_hash
        WHERE superseded.by_hash IN (SELECT hash FROM erased) AND rows.hash NOT IN (SELECT hash FROM erased)
    ), heirs AS (SELECT key, hash FROM fallen QUALIFY seq = max(seq) OVER (PARTITION BY key))
    SELECT fallen.hash AS lost, heirs.hash FROM fallen JOIN heirs USING (key) WHERE fallen.hash <> heirs.hash
) AS heirs
WHERE supersessions.row_hash = heirs.lost AND supersessions.by_hash IN (SELECT hash FROM erased);

-- name: erase_supersessions
DELETE FROM supersessions
WHERE row_hash IN (SELECT hash FROM erased) OR by_hash IN (SELECT hash FROM erased);

-- name: erase_rows
DELETE FROM rows WHERE hash IN (SELECT hash FROM erased);
