//! Expressions of Jinja's grammar.

use super::ast::{Arguments, Comparison, Constant, Expr, Operator};
use super::fault::{Fault, Result};
use super::lexer::Token;
use super::parser::{Parser, described};
use super::{filters, tests};

impl Parser {
    pub(super) fn expression(&mut self) -> Result<Expr> {
        self.deeper(Self::conditional)
    }

    pub(super) fn conditional(&mut self) -> Result<Expr> {
        let mut yes = self.or()?;
        while self.takes_name("if") {
            let test = self.leniently(true, Self::or)?;
            let no = if self.takes_name("else") {
                Some(Box::new(self.leniently(true, |p| p.deeper(Self::conditional))?))
            } else {
                None
            };
            yes = Expr::If { test: Box::new(test), yes: Box::new(yes), no };
        }
        Ok(yes)
    }

    pub(super) fn or(&mut self) -> Result<Expr> {
        let mut left = self.and()?;
        while self.takes_name("or") {
            left = Expr::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    pub(super) fn and(&mut self) -> Result<Expr> {
        let mut left = self.not()?;
        while self.takes_name("and") {
            left = Expr::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    pub(super) fn not(&mut self) -> Result<Expr> {
        if self.takes_name("not") {
            return Ok(Expr::Not(Box::new(self.deeper(Self::not)?)));
        }
        self.compare()
    }

    pub(super) fn compare(&mut self) -> Result<Expr> {
        let first = self.sum()?;
        let mut others = Vec::new();
        loop {
            let comparison = match self.token() {
                Token::Op("==") => Comparison::Equal,
                Token::Op("!=") => Comparison::NotEqual,
                Token::Op("<") => Comparison::Less,
                Token::Op("<=") => Comparison::LessEqual,
                Token::Op(">") => Comparison::Greater,
                Token::Op(">=") => Comparison::GreaterEqual,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name) if name == "not" && matches!(self.ahead(1), Token::Name(next) if next == "in") => {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            others.push((comparison, self.sum()?));
        }
        Ok(if others.is_empty() { first } else { Expr::Compare(Box::new(first), others) })
    }

    pub(super) fn sum(&mut self) -> Result<Expr> {
        let mut left = self.concat()?;
        loop {
            let operator = match self.token() {
                Token::Op("+") => Operator::Add,
                Token::Op("-") => Operator::Sub,
                _ => return Ok(left),
            };
            self.next();
            left = Expr::Binary(operator, Box::new(left), Box::new(self.concat()?));
        }
    }

    pub(super) fn concat(&mut self) -> Result<Expr> {
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.takes_op("~") {
            parts.push(self.product()?);
        }
        Ok(Expr::Concat(parts))
    }

    pub(super) fn product(&mut self) -> Result<Expr> {
        let mut left = self.power()?;
        loop {
            let operator = match self.token() {
                Token::Op("*") => Operator::Mul,
                Token::Op("/") => Operator::Div,
                Token::Op("//") => Operator::FloorDiv,
                Token::Op("%") => Operator::Mod,
                _ => return Ok(left),
            };
            self.next();
            left = Expr::Binary(operator, Box::new(left), Box::new(self.power()?));
        }
    }

    pub(super) fn power(&mut self) -> Result<Expr> {
        let mut left = self.unary(true)?;
        while self.takes_op("**") {
            left = Expr::Binary(Operator::Pow, Box::new(left), Box::new(self.unary(true)?));
        }
        Ok(left)
    }

    pub(super) fn unary(&mut self, with_filters: bool) -> Result<Expr> {
        let expr = if self.takes_op("-") {
            Expr::Negative(Box::new(self.deeper(|parser| parser.unary(false))?))
        } else if self.takes_op("+") {
            Expr::Positive(Box::new(self.deeper(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let expr = self.postfix(expr)?;
        if with_filters { self.filters_and_tests(expr) } else { Ok(expr) }
    }

    pub(super) fn primary(&mut self) -> Result<Expr> {
        let token = self.token().clone();
        match token {
            Token::Name(name) => {
                self.next();
                Ok(match name.as_str() {
                    "true" | "True" => Expr::Constant(Constant::Bool(true)),
                    "false" | "False" => Expr::Constant(Constant::Bool(false)),
                    "none" | "None" => Expr::Constant(Constant::None),
                    _ => {
                        self.names.read.insert(name.clone());
                        Expr::Name(name)
                    }
                })
            }
            Token::Str(mut text) => {
                self.next();
                while let Token::Str(more) = self.token() {
                    text.push_str(more);
                    self.next();
                }
                Ok(Expr::Constant(Constant::Str(text.into())))
            }
            Token::Int(number) => {
                self.next();
                Ok(Expr::Constant(Constant::Int(number)))
            }
            Token::Float(number) => {
                self.next();
                Ok(Expr::Constant(Constant::Float(number)))
            }
            Token::Op("(") => {
                self.next();
                let inner = self.deeper(Self::parenthesis)?;
                self.expect_op(")")?;
                Ok(inner)
            }
            Token::Op("[") => {
                self.next();
                Ok(Expr::List(self.separated("]", Self::expression)?))
            }
            Token::Op("{") => {
                self.next();
                Ok(Expr::Dict(self.separated("}", |parser| {
                    let key = parser.expression()?;
                    parser.expect_op(":")?;
                    Ok((key, parser.expression()?))
                })?))
            }
            token => self.fail(format!("unexpected {}", described(&token))),
        }
    }

    /// Items with commas between them and perhaps one at the end.
    pub(super) fn separated<T>(&mut self, end: &str, mut item: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        while !self.is_op(end) {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            if self.is_op(end) {
                break;
            }
            items.push(item(self)?);
        }
        self.expect_op(end)?;
        Ok(items)
    }

    pub(super) fn parenthesis(&mut self) -> Result<Expr> {
        if self.is_op(")") {
            return Ok(Expr::Tuple(Vec::new()));
        }
        self.tuple(true, &[])
    }

    /// An expression, or several with commas between them.
    pub(super) fn tuple(&mut self, conditional: bool, ends: &[&str]) -> Result<Expr> {
        let item = |parser: &mut Self| if conditional { parser.expression() } else { parser.deeper(Self::or) };
        self.one_or_tuple(ends, item, Expr::Tuple)
    }

    pub(super) fn postfix(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            if self.takes_op(".") {
                expr = self.dot(expr)?;
            } else if self.takes_op("[") {
                expr = self.deeper(|parser| parser.subscript(expr))?;
            } else if self.takes_op("(") {
                let arguments = self.deeper(Self::arguments)?;
                expr = Expr::Call(Box::new(expr), Box::new(arguments));
            } else {
                return Ok(expr);
            }
        }
    }

    pub(super) fn dot(&mut self, of: Expr) -> Result<Expr> {
        let found = match self.token() {
            Token::Name(name) => Expr::Attribute(Box::new(of), name.clone()),
            Token::Int(number) => Expr::Item(Box::new(of), Box::new(Expr::Constant(Constant::Int(*number)))),
            _ => return self.fail("expected name or number"),
        };
        self.next();
        Ok(found)
    }

    pub(super) fn subscript(&mut self, of: Expr) -> Result<Expr> {
        let mut first = None;
        if !self.is_op(":") {
            let index = self.expression()?;
            if self.takes_op("]") {
                return Ok(Expr::Item(Box::new(of), Box::new(index)));
            }
            if self.is_op(",") {
                let mut items = vec![index];
                while self.takes_op(",") {
                    items.push(self.expression()?);
                }
                self.expect_op("]")?;
                return Ok(Expr::Item(Box::new(of), Box::new(Expr::Tuple(items))));
            }
            first = Some(index);
        }
        let mut parts = [first, None, None];
        for part in parts.iter_mut().skip(1) {
            if !self.takes_op(":") {
                break;
            }
            if !self.is_op(":") && !self.is_op("]") {
                *part = Some(self.expression()?);
            }
        }
        self.expect_op("]")?;
        Ok(Expr::Slice(Box::new(of), Box::new(parts)))
    }

    /// Arguments behind the parenthesis.
    pub(super) fn arguments(&mut self) -> Result<Arguments> {
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            let starred = arguments.star.is_some() || arguments.stars.is_some();
            if self.takes_op("*") {
                if starred {
                    return self.fail("invalid syntax for function call expression");
                }
                arguments.star = Some(Box::new(self.expression()?));
            } else if self.takes_op("**") {
                if arguments.stars.is_some() {
                    return self.fail("invalid syntax for function call expression");
                }
                arguments.stars = Some(Box::new(self.expression()?));
            } else if let (Token::Name(name), Token::Op("=")) = (self.token(), self.ahead(1)) {
                let name = name.clone();
                if arguments.stars.is_some() {
                    return self.fail("invalid syntax for function call expression");
                }
                self.at += 2;
                let value = self.expression()?;
                arguments.named.push((name, value));
            } else if starred || !arguments.named.is_empty() {
                return self.fail("invalid syntax for function call expression");
            } else {
                arguments.positional.push(self.expression()?);
            }
        }
        self.expect_op(")")?;
        Ok(arguments)
    }

    pub(super) fn filters_and_tests(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            if self.is_op("|") {
                expr = self.filters(Some(expr), false)?;
            } else if self.takes_name("is") {
                expr = self.test(expr)?;
            } else if self.takes_op("(") {
                let arguments = self.deeper(Self::arguments)?;
                expr = Expr::Call(Box::new(expr), Box::new(arguments));
            } else {
                return Ok(expr);
            }
        }
    }

    pub(super) fn dotted(&mut self) -> Result<String> {
        let mut name = self.name()?;
        while self.takes_op(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    /// Filters, with or without a bar in front of the first one.
    pub(super) fn filters(&mut self, mut operand: Option<Expr>, mut inline: bool) -> Result<Expr> {
        while inline || self.takes_op("|") {
            inline = false;
            let line = self.line();
            let name = self.dotted()?;
            if !self.lenient && !filters::is_known(&name) {
                return Err(Fault::syntax(format!("No filter named '{name}'."), line));
            }
            if let (Some(Expr::Name(asked)), "default" | "d") = (&operand, name.as_str()) {
                self.names.asked.insert(asked.clone());
            }
            let arguments = if self.takes_op("(") { self.deeper(Self::arguments)? } else { Arguments::default() };
            operand = Some(Expr::Filter(operand.map(Box::new), name, Box::new(arguments)));
        }
        operand.map_or_else(|| self.expected("a filter"), Ok)
    }

    pub(super) fn test(&mut self, operand: Expr) -> Result<Expr> {
        let negated = self.takes_name("not");
        let line = self.line();
        let name = self.dotted()?;
        if !self.lenient && !tests::is_known(&name) {
            return Err(Fault::syntax(format!("No test named '{name}'."), line));
        }
        if let (Expr::Name(asked), "defined" | "undefined") = (&operand, name.as_str()) {
            self.names.asked.insert(asked.clone());
        }
        let mut arguments = Arguments::default();
        let has_operand = match self.token() {
            Token::Name(word) => !matches!(word.as_str(), "else" | "or" | "and"),
            Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{") => true,
            _ => false,
        };
        if self.takes_op("(") {
            arguments = self.deeper(Self::arguments)?;
        } else if has_operand {
            if self.is_name("is") {
                return self.fail("You cannot chain multiple tests with is");
            }
            // As Jinja: `is defined if` reads the next word as an argument of the test, unless it is a known one.
            let argument = self.primary()?;
            arguments.positional.push(self.postfix(argument)?);
        }
        let test = Expr::Test(Box::new(operand), name, Box::new(arguments));
        Ok(if negated { Expr::Not(Box::new(test)) } else { test })
    }
}
