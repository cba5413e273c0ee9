-- What an audit asks of the whole store. It reads, and every question's answer is empty in a healthy store,
-- but for those that only list: suite_members, suite_questions, sat, ever_superseded, known_given.

-- name: divided_questions
SELECT question_key, string_agg(DISTINCT split, ', ' ORDER BY split), min(hash) FROM rows
GROUP BY question_key HAVING count(DISTINCT split) > 1 ORDER BY question_key;

-- name: misplaced
SELECT cycle_rows.cycle_id, cycle_rows.role, cycle_rows.row_hash, rows.split
FROM cycle_rows JOIN rows ON rows.hash = cycle_rows.row_hash
WHERE rows.split <> CASE cycle_rows.role WHEN 'validation' THEN 'validation' ELSE 'train' END
ORDER BY cycle_rows.cycle_id, cycle_rows.row_hash;

-- name: lost_rows
SELECT cycle_rows.cycle_id, cycle_rows.role, cycle_rows.row_hash
FROM cycle_rows ANTI JOIN rows ON rows.hash = cycle_rows.row_hash
WHERE row_hash NOT IN (SELECT hash FROM erased)
ORDER BY cycle_rows.cycle_id, cycle_rows.row_hash;

-- name: learned_by_several
SELECT cycles, count(*), min(row_hash) FROM (
    SELECT row_hash, list(cycle_id ORDER BY cycle_id) AS cycles FROM cycle_rows
    WHERE role = 'train' AND row_hash NOT IN (SELECT row_hash FROM supersessions WHERE by_hash IS NULL)
    GROUP BY row_hash HAVING count(*) > 1
) GROUP BY cycles ORDER BY cycles;

-- name: unanswered
SELECT key, min(hash) FROM rows ANTI JOIN standing USING (key) GROUP BY key ORDER BY key;

-- name: stray_supersessions
SELECT moves.row_hash, moves.by_hash
FROM supersessions AS moves
LEFT JOIN rows AS lost ON lost.hash = moves.row_hash
LEFT JOIN rows AS won ON won.hash = moves.by_hash
WHERE lost.hash IS NULL OR (moves.by_hash IS NOT NULL AND won.key IS DISTINCT FROM lost.key)
ORDER BY moves.seq;

-- name: ever_superseded
SELECT DISTINCT row_hash FROM supersessions;

-- name: known_given
SELECT rows.hash FROM rows JOIN given USING (hash);

-- name: suite_members
SELECT task, version, row_hash FROM suite_rows ORDER BY task, version, row_hash;

-- name: suite_questions
SELECT DISTINCT question_key FROM rows WHERE split = 'suite';

-- name: sat
SELECT model, exam, count(*) FROM predictions GROUP BY model, exam ORDER BY model, exam;
