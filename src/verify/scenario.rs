//! The scenarios: the ways in which a client may run a decoder, each of which has to give the same logits.

use crate::error::Result;
use crate::session::{Decoder, Floats, IntMatrix, State};

use super::metrics::{Comparison, Logits, argmax, compare};

/// One way of running a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// The first row at once.
    Prefill,
    /// All rows at once, padded on the left.
    BatchLeft,
    /// All rows at once, padded on the right.
    BatchRight,
    /// The first row: ten tokens, then one by one through the cache.
    Decode,
    /// The first row in two pieces.
    Chunks,
    /// All rows, padded on the left: twelve tokens, then one by one through the cache.
    BatchDecode,
    /// All rows, padded on the right, then one by one behind the padding, as onnxruntime-genai runs a ragged batch.
    BatchDecodeRight,
}

impl Scenario {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 7] = [
        Self::Prefill,
        Self::BatchLeft,
        Self::BatchRight,
        Self::Decode,
        Self::Chunks,
        Self::BatchDecode,
        Self::BatchDecodeRight,
    ];

    /// Rows are padded on the left.
    pub fn pads_left(self) -> bool {
        matches!(self, Self::BatchLeft | Self::BatchDecode)
    }

    /// All rows go through the cache.
    pub fn decodes_batch(self) -> bool {
        matches!(self, Self::BatchDecode | Self::BatchDecodeRight)
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::BatchLeft => "batch-left",
            Self::BatchRight => "batch-right",
            Self::Decode => "decode",
            Self::Chunks => "chunks",
            Self::BatchDecode => "batch-decode",
            Self::BatchDecodeRight => "batch-decode-right",
        }
    }

    /// The scenario by which a golden records the reference's own errors in half precision. transformers does not go on
    /// behind padding; the same tokens in the same pieces are those of the other padding.
    pub fn recorded_as(self) -> &'static str {
        match self {
            Self::BatchDecodeRight => Self::BatchDecode.name(),
            other => other.name(),
        }
    }

    /// How many rows of the prompt take part.
    pub fn rows(self, prompt: &Prompt) -> usize {
        match self {
            Self::Prefill | Self::Decode | Self::Chunks => 1,
            Self::BatchLeft | Self::BatchRight | Self::BatchDecode | Self::BatchDecodeRight => prompt.ids.rows,
        }
    }

    /// The sizes of the pieces in which the columns are run.
    pub fn pieces(self, prompt: &Prompt) -> Vec<usize> {
        let columns = prompt.ids.columns;
        let split = |first: usize| first.clamp(1, columns.saturating_sub(1).max(1));
        let one_by_one = |first: usize| {
            let mut pieces = vec![first];
            pieces.resize(1 + columns.saturating_sub(first), 1);
            pieces
        };
        match self {
            Self::Prefill | Self::BatchLeft | Self::BatchRight => vec![columns],
            Self::Decode => one_by_one(split(10)),
            Self::Chunks => vec![split(10), columns.saturating_sub(split(10))],
            // The first piece reaches a token of every row, as it does in a client.
            Self::BatchDecode | Self::BatchDecodeRight => one_by_one(split(prompt.most_padding().max(11) + 1)),
        }
    }
}

/// Rows of tokens, padded on the left.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Tokens.
    pub ids: IntMatrix,
    /// 1 for a token, 0 for padding.
    pub mask: IntMatrix,
    /// Position of each token in its row.
    pub positions: IntMatrix,
}

/// What a run returned, position by position, and the hidden states in the same form.
#[derive(Debug)]
pub struct Run {
    /// Logits.
    pub logits: Logits,
    /// Number and values of each hidden state.
    pub hidden_states: Vec<(usize, Logits)>,
}

impl Prompt {
    /// True where a token stands.
    pub fn live(&self, row: usize, column: usize) -> bool {
        self.mask.row(row).get(column).is_some_and(|m| *m != 0)
    }

    /// The most padding that a row has.
    fn most_padding(&self) -> usize {
        let padding = |row: usize| self.mask.row(row).iter().filter(|m| **m == 0).count();
        (0..self.mask.rows).map(padding).max().unwrap_or(0)
    }

    fn first_rows(&self, rows: usize) -> Self {
        Self {
            ids: self.ids.first_rows(rows),
            mask: self.mask.first_rows(rows),
            positions: self.positions.first_rows(rows),
        }
    }

    /// One row without its padding.
    fn row_alone(&self, row: usize) -> Self {
        let ids: Vec<i64> = (0..self.ids.columns)
            .filter(|c| self.live(row, *c))
            .filter_map(|c| self.ids.row(row).get(c).copied())
            .collect();
        let positions = (0_i64..).take(ids.len()).collect();
        let mask = vec![1; ids.len()];
        Self {
            ids: IntMatrix::from_row(ids),
            mask: IntMatrix::from_row(mask),
            positions: IntMatrix::from_row(positions),
        }
    }

    /// The rows with their padding moved behind all but the last `behind` columns of tokens, and for each row the columns
    /// in their new order.
    fn right_padded(&self, behind: usize) -> (Self, Vec<Vec<usize>>) {
        let mut orders = Vec::new();
        let mut moved = Self {
            ids: IntMatrix { data: Vec::new(), ..self.ids },
            mask: IntMatrix { data: Vec::new(), ..self.mask },
            positions: IntMatrix { data: Vec::new(), ..self.positions },
        };
        for row in 0..self.ids.rows {
            let (mut order, padding): (Vec<usize>, Vec<usize>) =
                (0..self.ids.columns).partition(|c| self.live(row, *c));
            let later = order.split_off(order.len().saturating_sub(behind));
            order.extend(padding);
            order.extend(later);
            moved.ids.data.extend(order.iter().filter_map(|c| self.ids.row(row).get(*c)));
            let mut tokens = 0..;
            for column in &order {
                let live = self.live(row, *column);
                moved.mask.data.push(live.into());
                moved.positions.data.push(if live { tokens.next().unwrap_or(0) } else { 0 });
            }
            orders.push(order);
        }
        (moved, orders)
    }
}

/// Runs a prompt as a scenario has it. What comes back stands where the tokens stood in the prompt.
pub fn run(decoder: &mut Decoder, prompt: &Prompt, scenario: Scenario) -> Result<Run> {
    let pieces = scenario.pieces(prompt);
    let (moved, orders) = match scenario {
        Scenario::BatchRight => prompt.right_padded(0),
        Scenario::BatchDecodeRight => prompt.right_padded(pieces.len().saturating_sub(1)),
        _ => return run_pieces(decoder, &prompt.first_rows(scenario.rows(prompt)), &pieces),
    };
    let run = run_pieces(decoder, &moved, &pieces)?;
    Ok(Run {
        logits: move_back(&run.logits, &orders),
        hidden_states: run.hidden_states.iter().map(|(i, h)| (*i, move_back(h, &orders))).collect(),
    })
}

/// Runs the first row alone, in the pieces of a scenario of many rows.
pub fn run_in_pieces_alone(decoder: &mut Decoder, prompt: &Prompt, scenario: Scenario) -> Result<Run> {
    run_pieces(decoder, &prompt.first_rows(1), &scenario.pieces(prompt))
}

/// Runs every row alone and unpadded; the results stand where the tokens stand in the padded prompt.
pub fn run_rows_alone(decoder: &mut Decoder, prompt: &Prompt) -> Result<Run> {
    let (rows, columns) = (prompt.ids.rows, prompt.ids.columns);
    let mut all = Run { logits: Logits::absent(rows, columns), hidden_states: Vec::new() };
    for row in 0..rows {
        let alone = prompt.row_alone(row);
        let run = run_pieces(decoder, &alone, &[alone.ids.columns])?;
        let places: Vec<usize> = (0..columns).filter(|c| prompt.live(row, *c)).map(|c| row * columns + c).collect();
        let place = |from: &Logits, to: &mut Logits| {
            for (values, place) in from.positions.iter().zip(&places) {
                if let Some(slot) = to.positions.get_mut(*place) {
                    slot.clone_from(values);
                }
            }
        };
        place(&run.logits, &mut all.logits);
        for (number, values) in &run.hidden_states {
            if all.hidden_states.iter().all(|(i, _)| i != number) {
                all.hidden_states.push((*number, Logits::absent(rows, columns)));
            }
            if let Some((_, table)) = all.hidden_states.iter_mut().find(|(i, _)| i == number) {
                place(values, table);
            }
        }
    }
    Ok(all)
}

fn move_back(table: &Logits, orders: &[Vec<usize>]) -> Logits {
    let mut back = Logits::absent(orders.len(), table.columns);
    for (row, order) in orders.iter().enumerate() {
        for (now, column) in order.iter().enumerate() {
            let values = table.positions.get(row * table.columns + now);
            if let (Some(slot), Some(values)) = (back.positions.get_mut(row * table.columns + column), values) {
                slot.clone_from(values);
            }
        }
    }
    back
}

fn run_pieces(decoder: &mut Decoder, prompt: &Prompt, pieces: &[usize]) -> Result<Run> {
    let (rows, columns) = (prompt.ids.rows, prompt.ids.columns);
    let mut state = decoder.empty_state(rows)?;
    let mut run = Run { logits: Logits::absent(rows, columns), hidden_states: Vec::new() };
    let mut at = 0;
    for size in pieces.iter().copied().filter(|s| *s > 0) {
        let new = at..at + size;
        let (ids, positions) = (prompt.ids.columns(new.clone()), prompt.positions.columns(new));
        let step = decoder.run(&ids, &prompt.mask.columns(0..at + size), &positions, &mut state)?;
        run.logits.enter(&step.logits, at, size);
        for (number, values) in step.hidden_states {
            if let Some((_, table)) = run.hidden_states.iter_mut().find(|(i, _)| *i == number) {
                table.enter(&values, at, size);
            } else {
                let mut table = Logits::absent(rows, columns);
                table.enter(&values, at, size);
                run.hidden_states.push((number, table));
            }
        }
        at += size;
    }
    Ok(run)
}

/// Compares the positions of some rows at which a token stands and both have logits.
pub fn compare_rows(got: &Logits, want: &Logits, prompt: &Prompt, rows: usize) -> Option<Comparison> {
    let places = (0..rows).flat_map(|r| (0..prompt.ids.columns).map(move |c| (r, c)));
    let live = places.filter(|(r, c)| prompt.live(*r, *c));
    compare(live.filter_map(|(r, c)| Some((got.at(r, c)?, want.at(r, c)?))))
}

/// Tokens and their logits.
#[derive(Debug)]
pub struct Continuation {
    /// The tokens that were chosen.
    pub ids: Vec<i64>,
    /// The logits from which each was chosen.
    pub logits: Vec<Vec<f32>>,
    /// The tokens before each step were given, not chosen: every step can be compared with another's.
    pub given: bool,
}

/// Continues the first row greedily, through the cache or by running everything again for each token.
pub fn continue_greedily(decoder: &mut Decoder, prompt: &Prompt, count: usize, cached: bool) -> Result<Continuation> {
    let mut ids = prompt.row_alone(0).ids.data;
    let (start, mut from) = (ids.len(), 0);
    let mut state = decoder.empty_state(1)?;
    let mut logits = Vec::new();
    while logits.len() < count {
        if !cached {
            (state, from) = (decoder.empty_state(1)?, 0);
        }
        let last = run_behind(decoder, &ids, from, &mut state)?;
        from = ids.len();
        ids.push(i64::try_from(argmax(&last)).unwrap_or(0));
        logits.push(last);
    }
    Ok(Continuation { ids: ids.split_off(start), logits, given: false })
}

/// The first row with given tokens behind it, through the cache: what the model would choose at each step, and its
/// logits. Up to the first choice that is another, this is what it would write by itself.
pub fn continue_along(decoder: &mut Decoder, prompt: &Prompt, given: &[i64]) -> Result<Continuation> {
    let mut ids = prompt.row_alone(0).ids.data;
    let (mut from, mut state) = (0, decoder.empty_state(1)?);
    let mut logits = Vec::new();
    for token in given {
        logits.push(run_behind(decoder, &ids, from, &mut state)?);
        from = ids.len();
        ids.push(*token);
    }
    let chosen = logits.iter().map(|last| i64::try_from(argmax(last)).unwrap_or(0)).collect();
    Ok(Continuation { ids: chosen, logits, given: true })
}

/// The last logits of a row whose first tokens, up to `from`, are in the state.
fn run_behind(decoder: &mut Decoder, ids: &[i64], from: usize, state: &mut State) -> Result<Vec<f32>> {
    let new = ids.get(from..).unwrap_or_default().to_vec();
    let all = i64::try_from(ids.len()).unwrap_or(i64::MAX);
    let first = all - i64::try_from(new.len()).unwrap_or(0);
    let (mask, positions) = (IntMatrix::from_row(vec![1; ids.len()]), IntMatrix::from_row((first..all).collect()));
    decoder.run_last(&IntMatrix::from_row(new), &mask, &positions, state)
}

/// The steps of `[1, steps, vocabulary]` as a list.
pub fn steps_of(tensor: &Floats) -> Vec<Vec<f32>> {
    let vocabulary = tensor.shape.last().copied().unwrap_or(0).max(1);
    tensor.data.chunks_exact(vocabulary).map(<[f32]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> Prompt {
        let matrix = |data: [i64; 8]| IntMatrix::new(2, 4, data.to_vec()).unwrap();
        Prompt {
            ids: matrix([1, 2, 3, 4, 9, 9, 5, 6]),
            mask: matrix([1, 1, 1, 1, 0, 0, 1, 1]),
            positions: matrix([0, 1, 2, 3, 0, 0, 0, 1]),
        }
    }

    #[test]
    fn padding_is_moved_behind_and_results_are_moved_back() {
        let (moved, orders) = prompt().right_padded(0);
        assert_eq!(moved.ids.data, [1, 2, 3, 4, 5, 6, 9, 9]);
        assert_eq!(moved.mask.data, [1, 1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(moved.positions.data, [0, 1, 2, 3, 0, 1, 0, 0]);
        let values = |ids: &IntMatrix| Logits {
            columns: 4,
            positions: ids.data.iter().map(|i| Some(vec![f32::from(i16::try_from(*i).unwrap())])).collect(),
        };
        assert_eq!(move_back(&values(&moved.ids), &orders).positions, values(&prompt().ids).positions);
        assert_eq!(prompt().row_alone(1).ids.data, [5, 6]);
        // One token stands behind the padding.
        let (moved, orders) = prompt().right_padded(1);
        assert_eq!(moved.ids.data, [1, 2, 3, 4, 5, 9, 9, 6]);
        assert_eq!(moved.mask.data, [1, 1, 1, 1, 1, 0, 0, 1]);
        assert_eq!(moved.positions.data, [0, 1, 2, 3, 0, 0, 0, 1]);
        assert_eq!(move_back(&values(&moved.ids), &orders).positions, values(&prompt().ids).positions);
    }

    #[test]
    fn pieces_cover_every_column() {
        let long = |columns: usize| {
            let row = || IntMatrix::from_row(vec![1; columns]);
            Prompt { ids: row(), mask: row(), positions: row() }
        };
        for scenario in Scenario::ALL {
            for columns in [2, 10, 11, 24] {
                assert_eq!(scenario.pieces(&long(columns)).iter().sum::<usize>(), columns, "{scenario:?} {columns}");
            }
        }
        assert_eq!(Scenario::Decode.pieces(&long(24)).len(), 15);
        assert_eq!(Scenario::Chunks.pieces(&long(24)), [10, 14]);
        assert_eq!(Scenario::BatchDecode.pieces(&long(24)).first(), Some(&12));
    }
}
