//! What a server prints of its virtqueues (SIGUSR1, and at the end), read back.

use std::collections::HashMap;

/// Both tables.
#[derive(Debug)]
pub struct Report {
    pub queues: Vec<Queue>,
}

/// One row: a disk by its socket, and every counter by the name in its column.
#[derive(Debug)]
pub struct Queue {
    pub disk: String,
    counters: HashMap<String, u64>,
}

impl Queue {
    #[track_caller]
    pub fn get(&self, counter: &str) -> u64 {
        let value = self.find(counter);
        value.unwrap_or_else(|| panic!("no counter {counter} in {self:?}"))
    }

    /// `None` also of a queue pair of another device than the host's.
    pub fn find(&self, counter: &str) -> Option<u64> {
        self.counters.get(counter).copied()
    }
}

impl Report {
    #[track_caller]
    pub fn total(&self, counter: &str) -> u64 {
        self.queues.iter().map(|queue| queue.get(counter)).sum()
    }

    /// Reads the tables, two or with SCSI hosts three, up to the last `total`. `None` while there are not two.
    pub fn parse(text: &str) -> Option<Report> {
        let totals: Vec<usize> = text.match_indices("\ntotal ").map(|(at, _)| at).collect();
        let last = *totals.get(1..)?.last()?;
        let end = last + 1 + text[last + 1..].find('\n')? + 1;
        let tables = &text[..end];
        let mut queues: Vec<Queue> = Vec::new();
        for table in tables.split("\n\n") {
            let lines: Vec<Vec<char>> = table.lines().map(|line| line.chars().collect()).collect();
            // Names of counters contain spaces, so columns are cut where the cells of the rows end.
            let ends = cell_ends(&lines[1]);
            for (index, line) in lines[1..lines.len() - 1].iter().enumerate() {
                let disk: String = line.iter().take_while(|char| **char != ' ').collect();
                if queues.len() <= index {
                    queues.push(Queue {
                        disk,
                        counters: HashMap::new(),
                    });
                }
                for (&end, &begin) in ends[1..].iter().zip(&ends) {
                    let name = if begin == ends[0] {
                        "vq".to_owned()
                    } else {
                        cell(&lines[0], begin, end)
                    };
                    let value = cell(line, begin, end).replace(',', "");
                    // "idle" is a share, not a count.
                    if let Ok(value) = value.parse() {
                        queues[index].counters.insert(name, value);
                    }
                }
            }
        }
        Some(Report { queues })
    }
}

fn cell_ends(line: &[char]) -> Vec<usize> {
    let ends = (0..line.len())
        .filter(|&at| line[at] != ' ' && line.get(at + 1).is_none_or(|next| *next == ' '));
    ends.map(|at| at + 1).collect()
}

fn cell(line: &[char], begin: usize, end: usize) -> String {
    line[begin..end]
        .iter()
        .collect::<String>()
        .trim()
        .to_owned()
}
