//! Tokens to a tree, by Jinja 3.1's grammar with loop controls and `{% generation %}`.

use std::sync::Arc;

use super::ast::{
    Arguments, Comparison, Constant, Does, Expr, For, Macro, Names, Operator, Statement, Target, Template,
};
use super::fault::{Fault, Result};
use super::lexer::{Token, tokens};
use super::{filters, tests};

/// How deep expressions and blocks may lie in each other. Python gives up at about 80 parentheses.
const DEEPEST: usize = 200;

pub(super) fn parse(source: &str) -> Result<Template> {
    let tokens = tokens(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, lenient: false, loops: 0, names: Names::default() };
    let body = parser.body(&[])?;
    Ok(Template { body, names: parser.names })
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: usize,
    /// Inside of a condition: there an unknown filter is an error only when it is reached.
    lenient: bool,
    /// Loops around, for `break`.
    loops: usize,
    names: Names,
}

impl Parser {
    fn token(&self) -> &Token {
        self.ahead(0)
    }

    fn ahead(&self, count: usize) -> &Token {
        self.tokens.get(self.at + count).or(self.tokens.last()).map_or(&Token::End, |(token, _)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |(_, line)| *line)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Fault::syntax(message, self.line()))
    }

    fn next(&mut self) {
        self.at += 1;
    }

    fn is_op(&self, operator: &str) -> bool {
        matches!(self.token(), Token::Op(found) if *found == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.token(), Token::Name(found) if found == name)
    }

    fn takes_op(&mut self, operator: &str) -> bool {
        let found = self.is_op(operator);
        self.at += usize::from(found);
        found
    }

    fn takes_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn expect_op(&mut self, operator: &str) -> Result<()> {
        if self.takes_op(operator) { Ok(()) } else { self.expected(&format!("'{operator}'")) }
    }

    fn expect_name(&mut self, name: &str) -> Result<()> {
        if self.takes_name(name) { Ok(()) } else { self.expected(&format!("'{name}'")) }
    }

    fn expect(&mut self, token: &Token) -> Result<()> {
        if self.token() == token {
            self.next();
            return Ok(());
        }
        self.expected(&described(token))
    }

    fn expected<T>(&self, what: &str) -> Result<T> {
        self.fail(format!("expected {what}, got {}", described(self.token())))
    }

    fn name(&mut self) -> Result<String> {
        let Token::Name(name) = self.token() else { return self.expected("a name") };
        let name = name.clone();
        self.next();
        Ok(name)
    }

    /// Goes one level down.
    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= DEEPEST {
            let found = format!("expressions or blocks within each other, more than {DEEPEST} deep");
            return Err(Fault::refused(found).at(self.line()));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    fn leniently<T>(&mut self, lenient: bool, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let before = std::mem::replace(&mut self.lenient, lenient);
        let parsed = parse(self);
        self.lenient = before;
        parsed
    }

    /// Statements up to one of the ends, whose name stays to be read.
    fn body(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.token() {
                Token::Data(text) => {
                    let does = Does::Data(text.as_str().into());
                    self.next();
                    body.push(Statement { line, does });
                }
                Token::VariableBegin => {
                    self.next();
                    let does = Does::Print(self.tuple(true, &[])?);
                    self.expect(&Token::VariableEnd)?;
                    body.push(Statement { line, does });
                }
                Token::BlockBegin => {
                    self.next();
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    let statement = self.deeper(|parser| parser.statement(ends))?;
                    body.extend(statement.into_iter().map(|does| Statement { line, does }));
                    self.expect(&Token::BlockEnd)?;
                }
                Token::End if ends.is_empty() => return Ok(body),
                Token::End => return self.fail(format!("Unexpected end of template: expected {}", ends.join(" or "))),
                _ => return self.fail("a template that can not be read"),
            }
        }
    }

    /// The body of a block, behind the block's head.
    fn block(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        self.takes_op(":");
        self.expect(&Token::BlockEnd)?;
        self.body(ends)
    }

    /// As `block`, with its only end.
    fn whole_block(&mut self, end: &str) -> Result<Vec<Statement>> {
        let body = self.block(&[end])?;
        self.next();
        Ok(body)
    }

    fn statement(&mut self, ends: &[&str]) -> Result<Vec<Does>> {
        let Token::Name(tag) = self.token() else { return self.fail("tag name expected") };
        let tag = tag.clone();
        self.next();
        let does = match tag.as_str() {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "macro" => self.macro_block()?,
            "call" => self.call_block()?,
            "filter" => {
                let filter = self.filters(None, true)?;
                Does::Filter { filter, body: self.leniently(false, |p| p.whole_block("endfilter"))? }
            }
            "with" => self.with()?,
            "print" => return self.print(),
            "block" => self.named_block()?,
            "generation" => Does::Scope { root: false, body: self.apart(|p| p.whole_block("endgeneration"))? },
            "break" | "continue" if self.loops == 0 => {
                return self.fail(format!("'{tag}' outside loop"));
            }
            "break" => Does::Break,
            "continue" => Does::Continue,
            "autoescape" => {
                if !matches!(self.expression()?, Expr::Constant(Constant::Bool(false))) {
                    return Err(Fault::refused("autoescape: chat is plain text").at(self.line()));
                }
                Does::Scope { root: false, body: self.leniently(false, |p| p.whole_block("endautoescape"))? }
            }
            "include" | "import" | "from" | "extends" => {
                return self
                    .fail(format!("'{tag}': a chat template is alone, there is no loader for this environment"));
            }
            _ if ends.is_empty() => return self.fail(format!("Encountered unknown tag '{tag}'.")),
            _ => {
                let wanted = ends.join(" or ");
                return self.fail(format!("Encountered unknown tag '{tag}'. Jinja was looking for: {wanted}."));
            }
        };
        Ok(vec![does])
    }

    /// Parses what is a function of its own in Jinja: no `break` leads out of it.
    fn apart<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let loops = std::mem::take(&mut self.loops);
        let parsed = self.leniently(false, parse);
        self.loops = loops;
        parsed
    }

    fn print(&mut self) -> Result<Vec<Does>> {
        let mut printed = Vec::new();
        while *self.token() != Token::BlockEnd {
            if !printed.is_empty() {
                self.expect_op(",")?;
            }
            printed.push(Does::Print(self.expression()?));
        }
        Ok(printed)
    }

    fn for_loop(&mut self) -> Result<Does> {
        let target = self.target(false, &["in"])?;
        if matches!(&target, Target::Name(name) if name == "loop") {
            return self.fail("Can't assign to special loop variable in for-loop.");
        }
        self.expect_name("in")?;
        let over = self.tuple(false, &["recursive"])?;
        let test = if self.takes_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.takes_name("recursive");
        self.loops += 1;
        let body = self.leniently(false, |p| p.block(&["endfor", "else"]));
        self.loops -= 1;
        let body = body?;
        let otherwise = if self.takes_name("else") {
            self.leniently(false, |p| p.whole_block("endfor"))?
        } else {
            self.next();
            Vec::new()
        };
        self.names.written.insert("loop".into());
        Ok(Does::For(Box::new(For { target, over, test, recursive, body, otherwise })))
    }

    fn condition(&mut self) -> Result<Does> {
        self.leniently(true, |parser| {
            let (mut branches, mut otherwise) = (Vec::new(), Vec::new());
            loop {
                let test = parser.tuple(false, &[])?;
                branches.push((test, parser.block(&["elif", "else", "endif"])?));
                if parser.takes_name("elif") {
                    continue;
                }
                if parser.takes_name("else") {
                    otherwise = parser.whole_block("endif")?;
                } else {
                    parser.next();
                }
                return Ok(Does::If { branches, otherwise });
            }
        })
    }

    fn set(&mut self) -> Result<Does> {
        let target = self.target(true, &[])?;
        if self.takes_op("=") {
            return Ok(Does::Set { target, value: self.tuple(true, &[])? });
        }
        let filter = if self.is_op("|") { Some(self.filters(None, false)?) } else { None };
        let body = self.apart(|p| p.whole_block("endset"))?;
        Ok(Does::SetBlock { target, filter, body })
    }

    fn with(&mut self) -> Result<Does> {
        let (mut targets, mut values) = (Vec::new(), Vec::new());
        while *self.token() != Token::BlockEnd {
            if !targets.is_empty() {
                self.expect_op(",")?;
            }
            targets.push(self.target(false, &[])?);
            self.expect_op("=")?;
            values.push(self.expression()?);
        }
        let body = self.leniently(false, |p| p.whole_block("endwith"))?;
        Ok(Does::With { targets, values, body })
    }

    fn named_block(&mut self) -> Result<Does> {
        let name = self.name()?;
        self.takes_name("scoped");
        self.takes_name("required");
        let body = self.apart(|p| p.whole_block("endblock"))?;
        self.takes_name(&name);
        Ok(Does::Scope { root: true, body })
    }

    /// Parameters and their defaults.
    fn signature(&mut self) -> Result<(Vec<String>, Vec<Expr>)> {
        let (mut parameters, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.name()?;
            self.names.written.insert(name.clone());
            parameters.push(name);
            if self.takes_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.fail("non-default argument follows default argument");
            }
        }
        self.expect_op(")")?;
        Ok((parameters, defaults))
    }

    fn macro_block(&mut self) -> Result<Does> {
        let name = self.name()?;
        self.names.written.insert(name.clone());
        Ok(Does::Macro(Arc::new(self.macro_body(name, "endmacro", true, None)?.0)))
    }

    fn call_block(&mut self) -> Result<Does> {
        let parameters = self.is_op("(");
        let (body, call) = self.macro_body("caller".into(), "endcall", parameters, Some(()))?;
        match call {
            Some(call @ Expr::Call(..)) => Ok(Does::Call { call, body: Arc::new(body) }),
            _ => self.fail("expected call"),
        }
    }

    /// A macro, or the body of a call with the call in front of it.
    fn macro_body(
        &mut self,
        name: String,
        end: &str,
        signed: bool,
        called: Option<()>,
    ) -> Result<(Macro, Option<Expr>)> {
        // What the body reads is asked for the special names; what is around must not count.
        let (parameters, defaults) = if signed { self.signature()? } else { (Vec::new(), Vec::new()) };
        let call = if called.is_some() { Some(self.expression()?) } else { None };
        let outer = std::mem::take(&mut self.names.read);
        let body = self.apart(|p| p.whole_block(end));
        let inner = std::mem::replace(&mut self.names.read, outer);
        let reads = |special: &str| inner.contains(special) && !parameters.iter().any(|p| p == special);
        let parsed = Macro {
            reads_varargs: reads("varargs"),
            reads_kwargs: reads("kwargs"),
            reads_caller: reads("caller"),
            name,
            parameters,
            defaults,
            body: body?,
        };
        self.names.read.extend(inner);
        self.names.written.extend(["varargs", "kwargs", "caller"].map(str::to_owned));
        Ok((parsed, call))
    }

    /// What is assigned to.
    fn target(&mut self, namespaces: bool, ends: &[&str]) -> Result<Target> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            let at_end = matches!(self.token(), Token::BlockEnd | Token::VariableEnd)
                || self.is_op(")")
                || ends.iter().any(|end| self.is_name(end));
            if at_end {
                break;
            }
            targets.push(self.one_target(namespaces)?);
            if !self.takes_op(",") {
                break;
            }
            is_tuple = true;
        }
        match (targets.pop(), is_tuple) {
            (Some(target), false) => Ok(target),
            (Some(last), true) => {
                targets.push(last);
                Ok(Target::Tuple(targets))
            }
            (None, _) => self.expected("an expression"),
        }
    }

    fn one_target(&mut self, namespaces: bool) -> Result<Target> {
        if self.takes_op("(") {
            let target = self.deeper(|parser| parser.target(namespaces, &[]))?;
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = match self.token() {
            Token::Name(name) if !is_constant(name) => name.clone(),
            _ => return self.fail(format!("can't assign to {}", described(self.token()))),
        };
        self.next();
        if namespaces && self.takes_op(".") {
            let attribute = self.name()?;
            self.names.read.insert(name.clone());
            return Ok(Target::Attribute(name, attribute));
        }
        self.names.written.insert(name.clone());
        Ok(Target::Name(name))
    }

    fn expression(&mut self) -> Result<Expr> {
        self.deeper(Self::conditional)
    }

    fn conditional(&mut self) -> Result<Expr> {
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

    fn or(&mut self) -> Result<Expr> {
        let mut left = self.and()?;
        while self.takes_name("or") {
            left = Expr::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let mut left = self.not()?;
        while self.takes_name("and") {
            left = Expr::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        if self.takes_name("not") {
            return Ok(Expr::Not(Box::new(self.deeper(Self::not)?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Result<Expr> {
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

    fn sum(&mut self) -> Result<Expr> {
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

    fn concat(&mut self) -> Result<Expr> {
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

    fn product(&mut self) -> Result<Expr> {
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

    fn power(&mut self) -> Result<Expr> {
        let mut left = self.unary(true)?;
        while self.takes_op("**") {
            left = Expr::Binary(Operator::Pow, Box::new(left), Box::new(self.unary(true)?));
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr> {
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

    fn primary(&mut self) -> Result<Expr> {
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
    fn separated<T>(&mut self, end: &str, mut item: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
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

    fn parenthesis(&mut self) -> Result<Expr> {
        if self.is_op(")") {
            return Ok(Expr::Tuple(Vec::new()));
        }
        self.tuple(true, &[])
    }

    /// An expression, or several with commas between them.
    fn tuple(&mut self, conditional: bool, ends: &[&str]) -> Result<Expr> {
        let (mut items, mut is_tuple) = (Vec::new(), false);
        loop {
            let at_end = matches!(self.token(), Token::BlockEnd | Token::VariableEnd)
                || self.is_op(")")
                || ends.iter().any(|end| self.is_name(end));
            if at_end {
                break;
            }
            items.push(if conditional { self.expression()? } else { self.deeper(Self::or)? });
            if !self.takes_op(",") {
                break;
            }
            is_tuple = true;
        }
        match (items.pop(), is_tuple) {
            (Some(item), false) => Ok(item),
            (Some(last), true) => {
                items.push(last);
                Ok(Expr::Tuple(items))
            }
            (None, _) => self.expected("an expression"),
        }
    }

    fn postfix(&mut self, mut expr: Expr) -> Result<Expr> {
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

    fn dot(&mut self, of: Expr) -> Result<Expr> {
        let found = match self.token() {
            Token::Name(name) => Expr::Attribute(Box::new(of), name.clone()),
            Token::Int(number) => Expr::Item(Box::new(of), Box::new(Expr::Constant(Constant::Int(*number)))),
            _ => return self.fail("expected name or number"),
        };
        self.next();
        Ok(found)
    }

    fn subscript(&mut self, of: Expr) -> Result<Expr> {
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
    fn arguments(&mut self) -> Result<Arguments> {
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

    fn filters_and_tests(&mut self, mut expr: Expr) -> Result<Expr> {
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

    fn dotted(&mut self) -> Result<String> {
        let mut name = self.name()?;
        while self.takes_op(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    /// Filters, with or without a bar in front of the first one.
    fn filters(&mut self, mut operand: Option<Expr>, mut inline: bool) -> Result<Expr> {
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

    fn test(&mut self, operand: Expr) -> Result<Expr> {
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

fn is_constant(name: &str) -> bool {
    matches!(name, "true" | "True" | "false" | "False" | "none" | "None")
}

fn described(token: &Token) -> String {
    match token {
        Token::Data(_) => "template data".into(),
        Token::VariableBegin => "begin of print statement".into(),
        Token::VariableEnd => "end of print statement".into(),
        Token::BlockBegin => "begin of statement block".into(),
        Token::BlockEnd => "end of statement block".into(),
        Token::Name(name) => format!("'{name}'"),
        Token::Str(text) => format!("{text:?}"),
        Token::Int(number) => number.to_string(),
        Token::Float(number) => number.to_string(),
        Token::Op(operator) => format!("'{operator}'"),
        Token::End => "end of template".into(),
    }
}
