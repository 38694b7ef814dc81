//! JSON that is right but for a few values: what is behind a parser is not reached by texts that do not parse.

use serde_json::Value;

use crate::input::Input;

/// Numbers at the edges of their types, and usual ones.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    3,
    8,
    255,
    1_000,
    65_535,
    1 << 20,
    u32::MAX as u64 - 1,
    u32::MAX as u64,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// Changes up to seven values as the input says: which, and to what.
pub fn disturb(value: &mut Value, input: &mut Input<'_>) {
    for _ in 0..input.u8() % 8 {
        let count = leaves(value);
        let mut place = usize::from(input.u16()) % count.max(1);
        if let Some(leaf) = leaf(value, &mut place) {
            *leaf = other(leaf, input);
        }
    }
}

fn other(leaf: &Value, input: &mut Input<'_>) -> Value {
    let choice = input.u8();
    match (choice % 8, leaf) {
        (0, _) => Value::Null,
        (1, _) => String::from_utf8_lossy(input.field()).into(),
        (2, _) => Value::Bool(choice & 8 != 0),
        (3, Value::Array(items)) => items
            .iter()
            .chain(items)
            .cloned()
            .collect::<Vec<_>>()
            .into(),
        (4, _) => input.u64().into(),
        (_, _) => NUMBERS[usize::from(choice >> 3) % NUMBERS.len()].into(),
    }
}

/// Every number, text, truth value and list; lists count beside what they hold.
fn leaves(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(leaves).sum::<usize>(),
        Value::Object(fields) => fields.values().map(leaves).sum(),
        _ => 1,
    }
}

fn leaf<'v>(value: &'v mut Value, place: &mut usize) -> Option<&'v mut Value> {
    if !value.is_object() {
        if *place == 0 {
            return Some(value);
        }
        *place -= 1;
    }
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| leaf(item, place)),
        Value::Object(fields) => fields.values_mut().find_map(|field| leaf(field, place)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_value_can_be_reached_and_changed() {
        let before = json!({"a": [1, {"b": "c"}], "d": true});
        assert_eq!(leaves(&before), 4);
        for place in 0..4 {
            let mut after = before.clone();
            let input = [1, place, 0, 0];
            disturb(&mut after, &mut Input(&input));
            assert_ne!(after, before, "{place}");
        }
    }
}
