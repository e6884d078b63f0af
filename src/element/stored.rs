//! Element types as safetensors names them.

use std::fmt;

use super::ElementType;

macro_rules! stored_types {
    ($($variant:ident $name:literal $bits:literal $doc:literal,)*) => {
        /// Element type of a stored tensor: everything that the safetensors format knows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum StoredType {
            $(#[doc = $doc] $variant,)*
        }

        impl StoredType {
            /// Every type.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in a safetensors header.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Size of one element in bits; some elements are smaller than a byte.
            pub fn bits(self) -> u64 {
                match self { $(Self::$variant => $bits,)* }
            }
        }
    };
}

stored_types! {
    Bool "BOOL" 8 "Boolean, one byte each.",
    F4 "F4" 4 "4-bit float of MXFP4, two to a byte.",
    F6E2M3 "F6_E2M3" 6 "6-bit float, 2 exponent bits.",
    F6E3M2 "F6_E3M2" 6 "6-bit float, 3 exponent bits.",
    U8 "U8" 8 "Unsigned 8-bit integer.",
    I8 "I8" 8 "Signed 8-bit integer.",
    F8E5M2 "F8_E5M2" 8 "8-bit float, 5 exponent bits.",
    F8E4M3 "F8_E4M3" 8 "8-bit float, 4 exponent bits.",
    F8E8M0 "F8_E8M0" 8 "8-bit power of two: the scale of MX formats.",
    F8E5M2Fnuz "F8_E5M2FNUZ" 8 "8-bit float without negative zero, 5 exponent bits.",
    F8E4M3Fnuz "F8_E4M3FNUZ" 8 "8-bit float without negative zero, 4 exponent bits.",
    I16 "I16" 16 "Signed 16-bit integer.",
    U16 "U16" 16 "Unsigned 16-bit integer.",
    F16 "F16" 16 "IEEE half precision.",
    BF16 "BF16" 16 "bfloat16.",
    I32 "I32" 32 "Signed 32-bit integer.",
    U32 "U32" 32 "Unsigned 32-bit integer.",
    F32 "F32" 32 "32-bit float.",
    C64 "C64" 64 "Complex number of two 32-bit floats.",
    F64 "F64" 64 "64-bit float.",
    I64 "I64" 64 "Signed 64-bit integer.",
    U64 "U64" 64 "Unsigned 64-bit integer.",
}

impl StoredType {
    /// The type with this name in a safetensors header.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.as_str() == name)
    }

    /// The element type that graphs know it by; none for types that have to be decoded first.
    pub fn element(self) -> Option<ElementType> {
        Some(match self {
            Self::Bool => ElementType::Bool,
            Self::U8 => ElementType::U8,
            Self::I8 => ElementType::I8,
            Self::F16 => ElementType::F16,
            Self::BF16 => ElementType::BF16,
            Self::I32 => ElementType::I32,
            Self::F32 => ElementType::F32,
            Self::F64 => ElementType::F64,
            Self::I64 => ElementType::I64,
            _ => return None,
        })
    }

    /// Bytes that a tensor of this shape takes. None when the shape overflows (dimensions of 0 do
    /// not excuse the others) or when its elements do not fill whole bytes.
    pub fn byte_length(self, shape: &[usize]) -> Option<u64> {
        let mut widest = self.bits();
        for &dimension in shape {
            widest = widest.checked_mul(u64::try_from(dimension.max(1)).ok()?)?;
        }
        // Everything downstream computes in i64 or isize.
        i64::try_from(widest).ok()?;
        if shape.contains(&0) {
            return Some(0);
        }
        widest.is_multiple_of(8).then_some(widest / 8)
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for &dtype in StoredType::ALL {
            assert_eq!(StoredType::parse(dtype.as_str()), Some(dtype));
            if let Some(element) = dtype.element() {
                assert_eq!(element.size() as u64 * 8, dtype.bits());
            }
        }
        assert_eq!(StoredType::parse("f32"), None);
    }

    #[test]
    fn byte_lengths() {
        assert_eq!(StoredType::F32.byte_length(&[]), Some(4));
        assert_eq!(StoredType::BF16.byte_length(&[3, 5]), Some(30));
        assert_eq!(StoredType::F32.byte_length(&[0, 7]), Some(0));
        assert_eq!(StoredType::F4.byte_length(&[3]), None);
        assert_eq!(StoredType::F4.byte_length(&[4]), Some(2));
        assert_eq!(StoredType::U8.byte_length(&[usize::MAX, 2]), None);
        assert_eq!(StoredType::U8.byte_length(&[0, usize::MAX, 2]), None);
    }
}
