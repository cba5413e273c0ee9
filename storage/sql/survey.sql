-- What an audit asks of the whole store. It reads, and every question's answer is empty in a healthy store,
-- but for the three that only list: suite_members, suite_questions, sat.

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
ORDER BY cycle_rows.cycle_id, cycle_rows.row_hash;

-- name: learned_by_several
SELECT cycles, count(*), min(row_hash) FROM (
    SELECT row_hash, list(cycle_id ORDER BY cycle_id) AS cycles FROM cycle_rows
    WHERE role = 'train' GROUP BY row_hash HAVING count(*) > 1
) GROUP BY cycles ORDER BY cycles;

-- name: suite_members
SELECT task, version, row_hash FROM suite_rows ORDER BY task, version, row_hash;

-- name: suite_questions
SELECT DISTINCT question_key FROM rows WHERE split = 'suite';

-- name: sat
SELECT model, exam, count(*) FROM predictions GROUP BY model, exam ORDER BY model, exam;
