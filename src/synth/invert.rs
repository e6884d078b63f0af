//! From the shape of a parameter back to the shapes of the tensors that it is made of.

use crate::weight::Weight;

/// The tensors that an expression reads when its result has this shape.
pub(super) fn sources(weight: &Weight, shape: Vec<usize>) -> Result<Vec<(String, Vec<usize>)>, String> {
    let mut found = Vec::new();
    visit(weight, shape, &mut found)?;
    Ok(found)
}

/// True if what is stored lacks the 1 that is added to it.
pub(super) fn adds_one(weight: &Weight) -> bool {
    match weight {
        Weight::Source(_) => false,
        Weight::AddOne(_) => true,
        Weight::Concat(_, parts) | Weight::Stack(parts) | Weight::Interleave(_, parts) => parts.iter().any(adds_one),
        Weight::Split(_, inner) | Weight::Transpose(inner) | Weight::Reshape(_, inner) => adds_one(inner),
    }
}

fn visit(weight: &Weight, mut shape: Vec<usize>, found: &mut Vec<(String, Vec<usize>)>) -> Result<(), String> {
    match weight {
        Weight::Source(name) => {
            found.push((name.clone(), shape));
            Ok(())
        }
        Weight::AddOne(inner) => visit(inner, shape, found),
        Weight::Transpose(inner) => {
            let [.., rows, columns] = shape.as_mut_slice() else {
                return Err(format!("{weight} can not have shape {shape:?}"));
            };
            std::mem::swap(rows, columns);
            visit(inner, shape, found)
        }
        Weight::Stack(parts) => {
            if shape.first() != Some(&parts.len()) {
                return Err(format!("{weight} can not have shape {shape:?}"));
            }
            shape.remove(0);
            parts.iter().try_for_each(|part| visit(part, shape.clone(), found))
        }
        // Nothing says how long the parts are: checkpoints that are joined are cut into equal ones.
        Weight::Concat(axis, parts) | Weight::Interleave(axis, parts) => {
            let whole = shape.clone();
            let length = shape.get_mut(*axis).filter(|length| length.is_multiple_of(parts.len()));
            let length = length.ok_or_else(|| format!("{weight} of shape {whole:?} does not fall into equal parts"))?;
            *length /= parts.len();
            parts.iter().try_for_each(|part| visit(part, shape.clone(), found))
        }
        Weight::Split(split, inner) => {
            let piece = shape.clone();
            let length = shape.get_mut(split.axis).filter(|length| split.sizes.get(split.index) == Some(*length));
            *length.ok_or_else(|| format!("{weight} can not have shape {piece:?}"))? = split.sizes.iter().sum();
            visit(inner, shape, found)
        }
        // What is reshaped is stored as a matrix of the same columns: experts below each other, or one row.
        Weight::Reshape(_, inner) => {
            let columns = shape.pop().unwrap_or(1);
            visit(inner, vec![shape.iter().product(), columns], found)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::Split;

    fn a() -> Weight {
        Weight::source("a")
    }

    fn ab() -> Vec<Weight> {
        vec![a(), Weight::source("b")]
    }

    fn split(axis: usize, sizes: &[usize], index: usize) -> Weight {
        Weight::Split(Split { axis, groups: 1, sizes: sizes.to_vec(), index }, Box::new(a()))
    }

    /// What is found has to give the shape that was asked for.
    fn check(weight: &Weight, shape: &[usize], a: &[usize]) {
        let found = sources(weight, shape.to_vec()).expect("inverts");
        assert!(found.iter().all(|(_, shape)| shape == a), "{weight}: {found:?}");
        let of = |_: &str| Some(a.to_vec());
        assert_eq!(weight.shape(&of).expect("a shape"), shape);
    }

    #[test]
    fn every_transform_is_inverted() {
        check(&a(), &[2, 3], &[2, 3]);
        check(&Weight::AddOne(Box::new(a())), &[3], &[3]);
        check(&Weight::Transpose(Box::new(a())), &[4, 2, 3], &[4, 3, 2]);
        check(&Weight::Stack(ab()), &[2, 5, 3], &[5, 3]);
        check(&Weight::Concat(1, ab()), &[5, 6], &[5, 3]);
        check(&Weight::Interleave(0, ab()), &[6, 5], &[3, 5]);
        check(&split(0, &[4, 2], 1), &[2, 3], &[6, 3]);
        check(&Weight::Reshape(vec![2, 5, 3], Box::new(a())), &[2, 5, 3], &[10, 3]);
        check(&Weight::Reshape(vec![7], Box::new(a())), &[7], &[1, 7]);
    }

    #[test]
    fn what_can_not_be_is_an_error() {
        assert!(sources(&Weight::Transpose(Box::new(a())), vec![3]).is_err());
        assert!(sources(&Weight::Stack(ab()), vec![3, 5]).is_err());
        assert!(sources(&Weight::Concat(0, ab()), vec![5]).is_err());
        assert!(sources(&split(1, &[4, 2], 1), vec![2, 3]).is_err());
        assert!(sources(&split(4, &[4, 2], 1), vec![2, 3]).is_err());
    }

    #[test]
    fn a_one_is_seen_below_other_transforms() {
        assert!(adds_one(&Weight::Reshape(vec![3], Box::new(Weight::AddOne(Box::new(a()))))));
        assert!(!adds_one(&Weight::Stack(ab())));
    }
}
