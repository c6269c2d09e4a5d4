//! A grid with walls, pits and a goal.

use serde::{Deserialize, Serialize};

use super::environment::{Environment, Noise, Outcome};
use crate::error::{Error, Result, ensure};

/// A map of `S` (start; of several one is drawn), `.`, `#` (wall), `G` (goal) and `X` (pit). Actions: up,
/// right, down, left. With probability `slip` the move goes to the left or to the right of the one meant, each as
/// likely; a move against a wall or the edge stays. Each step costs `step_cost`; goal (+1) and pit (−1) end the
/// episode.
///
/// An observation is 1 at the cell where one is and 0 elsewhere: a policy without a hidden layer is a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map", into = "Map")]
pub struct GridWorld {
    map: Map,
    cells: Vec<u8>,
    starts: Vec<usize>,
    cell: usize,
}

/// What a recipe says of a grid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Map {
    rows: Vec<String>,
    slip: f64,
    step_cost: f64,
    time_limit: u32,
}

impl GridWorld {
    /// A world from the rows of its map.
    ///
    /// # Errors
    /// When rows differ in length or hold another sign, there is no start, `slip` is no probability,
    /// `step_cost` is not finite or `time_limit` is 0.
    pub fn new(rows: &[&str], slip: f64, step_cost: f64, time_limit: u32) -> Result<Self> {
        Self::try_from(Map {
            rows: rows.iter().map(|&r| r.into()).collect(),
            slip,
            step_cost,
            time_limit,
        })
    }

    /// The cell beside `cell`, in one of the four directions; itself where there is none.
    fn beside(&self, cell: usize, direction: usize) -> usize {
        let (width, height) = (self.map.rows[0].len(), self.map.rows.len());
        let (x, y) = (cell % width, cell / width);
        let next = match direction {
            0 if y > 0 => cell - width,
            1 if x + 1 < width => cell + 1,
            2 if y + 1 < height => cell + width,
            3 if x > 0 => cell - 1,
            _ => cell,
        };
        if self.cells[next] == b'#' { cell } else { next }
    }
}

impl TryFrom<Map> for GridWorld {
    type Error = Error;

    fn try_from(map: Map) -> Result<Self> {
        let op = "grid world";
        let width = map.rows.first().map_or(0, String::len);
        let even = width > 0 && map.rows.iter().all(|r| r.len() == width);
        ensure(even, op, || {
            "the rows of the map differ in length, or there are none".into()
        })?;
        let cells: Vec<u8> = map.rows.iter().flat_map(|r| r.bytes()).collect();
        let wrong = cells.iter().find(|c| !b"S.#GX".contains(c));
        ensure(wrong.is_none(), op, || {
            let sign = wrong.copied().map(char::from);
            format!("{sign:?} is on the map, expected S . # G X")
        })?;
        let starts: Vec<usize> = (0..cells.len()).filter(|&i| cells[i] == b'S').collect();
        ensure(!starts.is_empty(), op, || "there is no start, S".into())?;
        ensure((0.0..=1.0).contains(&map.slip), op, || {
            format!("slip is {}, expected 0 to 1", map.slip)
        })?;
        ensure(map.step_cost.is_finite(), op, || {
            format!("step_cost is {}, expected a finite number", map.step_cost)
        })?;
        ensure(map.time_limit > 0, op, || {
            "time_limit is 0, expected at least 1".into()
        })?;
        Ok(Self {
            cell: starts[0],
            cells,
            starts,
            map,
        })
    }
}

impl From<GridWorld> for Map {
    fn from(world: GridWorld) -> Self {
        world.map
    }
}

impl Environment for GridWorld {
    fn observation_size(&self) -> usize {
        self.cells.len()
    }

    fn actions(&self) -> usize {
        4
    }

    fn time_limit(&self) -> Option<u32> {
        Some(self.map.time_limit)
    }

    fn reset(&mut self, noise: Noise) {
        let drawn = noise.uniform(0) * self.starts.len() as f64;
        self.cell = self.starts[(drawn as usize).min(self.starts.len() - 1)];
    }

    fn observe(&self, into: &mut Vec<f32>) {
        into.extend((0..self.cells.len()).map(|i| f32::from(u8::from(i == self.cell))));
    }

    fn step(&mut self, action: usize, noise: Noise) -> Outcome {
        let u = noise.uniform(0);
        let direction = if u < self.map.slip / 2.0 {
            (action + 3) % 4
        } else if u < self.map.slip {
            (action + 1) % 4
        } else {
            action
        };
        self.cell = self.beside(self.cell, direction);
        let end = match self.cells[self.cell] {
            b'G' => Some(1.0),
            b'X' => Some(-1.0),
            _ => None,
        };
        Outcome {
            reward: end.unwrap_or(0.0) - self.map.step_cost,
            terminated: end.is_some(),
        }
    }

    fn state(&self) -> Vec<f64> {
        vec![self.cell as f64]
    }

    fn restore(&mut self, state: &[f64]) {
        self.cell = state[0] as usize;
    }
}
