//! Symbolic dimensions: polynomials with integer coefficients over a few named sizes.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Add, Mul};

/// A size that is known only when the model runs. The names are those that consumers look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Symbol {
    /// Rows of the batch.
    Batch,
    /// Tokens already in the cache.
    Past,
    /// New tokens.
    Sequence,
}

impl Symbol {
    const ALL: [Self; 3] = [Self::Batch, Self::Past, Self::Sequence];

    fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch_size",
            Self::Past => "past_sequence_length",
            Self::Sequence => "sequence_length",
        }
    }
}

/// Exponents of the symbols, in the order of [`Symbol::ALL`].
type Monomial = [u8; 3];

/// A dimension: a sum of products of symbols.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dim(BTreeMap<Monomial, i64>);

impl Dim {
    /// A fixed size.
    pub fn fixed(size: usize) -> Self {
        Self::constant(i64::try_from(size).unwrap_or(i64::MAX))
    }

    /// A fixed number; negative ones occur only in differences.
    pub fn constant(value: i64) -> Self {
        let mut terms = BTreeMap::new();
        if value != 0 {
            terms.insert([0; 3], value);
        }
        Self(terms)
    }

    /// One symbol.
    pub fn symbol(symbol: Symbol) -> Self {
        let exponents = Symbol::ALL.map(|s| u8::from(s == symbol));
        Self(BTreeMap::from([(exponents, 1)]))
    }

    /// The value, if no symbol occurs.
    pub fn value(&self) -> Option<i64> {
        match self.0.iter().next() {
            None => Some(0),
            Some(([0, 0, 0], value)) if self.0.len() == 1 => Some(*value),
            Some(_) => None,
        }
    }

    /// `self / divisor`, where that leaves nothing over.
    pub fn divided_by(&self, divisor: &Self) -> Option<Self> {
        let (lead, lead_coefficient) = divisor.0.iter().next_back()?;
        let (mut rest, mut quotient) = (self.clone(), Self::constant(0));
        // Long division by the leading term; each step removes the leading term of the rest.
        while let Some((monomial, coefficient)) = rest.0.iter().next_back() {
            let mut term = *monomial;
            for (own, other) in term.iter_mut().zip(lead) {
                *own = own.checked_sub(*other)?;
            }
            if coefficient % lead_coefficient != 0 {
                return None;
            }
            let term = Self(BTreeMap::from([(term, coefficient / lead_coefficient)]));
            rest = &rest + &(&(&term * divisor) * &Self::constant(-1));
            quotient = &quotient + &term;
        }
        Some(quotient)
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Self {
        Self::fixed(size)
    }
}

impl From<Symbol> for Dim {
    fn from(symbol: Symbol) -> Self {
        Self::symbol(symbol)
    }
}

impl Add for &Dim {
    type Output = Dim;

    fn add(self, other: &Dim) -> Dim {
        let mut terms = self.0.clone();
        for (monomial, value) in &other.0 {
            let sum = terms.entry(*monomial).or_insert(0);
            *sum = sum.saturating_add(*value);
        }
        terms.retain(|_, value| *value != 0);
        Dim(terms)
    }
}

impl Mul for &Dim {
    type Output = Dim;

    #[expect(clippy::suspicious_arithmetic_impl, reason = "a product of sums is a sum of products")]
    fn mul(self, other: &Dim) -> Dim {
        let mut product = Dim::constant(0);
        for (left, a) in &self.0 {
            for (right, b) in &other.0 {
                let mut monomial = *left;
                for (own, more) in monomial.iter_mut().zip(right) {
                    *own = own.saturating_add(*more);
                }
                product = &product + &Dim(BTreeMap::from([(monomial, a.saturating_mul(*b))]));
            }
        }
        product
    }
}

impl fmt::Display for Dim {
    /// `past_sequence_length + sequence_length`, letter for letter as consumers parse it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("0");
        }
        // The largest exponents first: batch before past before sequence, numbers last.
        for (position, (monomial, coefficient)) in self.0.iter().rev().enumerate() {
            if position > 0 {
                f.write_str(" + ")?;
            }
            let mut factors: Vec<String> = Vec::new();
            if *coefficient != 1 || *monomial == [0; 3] {
                factors.push(coefficient.to_string());
            }
            for (symbol, exponent) in Symbol::ALL.iter().zip(monomial) {
                factors.extend((0..*exponent).map(|_| symbol.name().to_owned()));
            }
            f.write_str(&factors.join("*"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_spelled_as_consumers_expect() {
        let total = &Dim::from(Symbol::Past) + &Dim::from(Symbol::Sequence);
        assert_eq!(total.to_string(), "past_sequence_length + sequence_length");
        assert_eq!((&Dim::from(Symbol::Sequence) + &Dim::from(Symbol::Past)), total);
    }

    #[test]
    fn products_divide_back() {
        let tokens = &Dim::from(Symbol::Batch) * &Dim::from(Symbol::Sequence);
        let elements = &tokens * &Dim::from(64);
        assert_eq!(elements.to_string(), "64*batch_size*sequence_length");
        assert_eq!(elements.divided_by(&Dim::from(64)), Some(tokens.clone()));
        assert_eq!(elements.divided_by(&tokens), Some(Dim::from(64)));
        assert_eq!(elements.divided_by(&Dim::from(Symbol::Past)), None);
        let total = &Dim::from(Symbol::Past) + &Dim::from(Symbol::Sequence);
        let scores = &(&tokens * &total) * &Dim::from(4);
        assert_eq!(scores.divided_by(&(&total * &Dim::from(2))), Some(&tokens * &Dim::from(2)), "by a sum");
        assert_eq!(Dim::from(7).value(), Some(7));
        assert_eq!(tokens.value(), None);
    }
}
